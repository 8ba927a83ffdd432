"""Quantized evaluation: that weights really are rounded, to within a step, and what is kept of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers import run_processes
from simnpo_pl.__main__ import main
from simnpo_pl.studies.quantize import quantize
from simnpo_pl.utils.errors import UserError


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32), (4, 16)])
def test_round_trip(model_folder: Path, bits: int, group_size: int | None):
    """Within half a step of the weights, on a grid of 2^bits values a scale; head and embeddings untouched.

    By hand: of a row or group with largest magnitude m the step is m / ((2^bits - 1) / 2), so that the grid spans
    [-m, m]; rounding to the nearest step moves a weight by half a step at most.
    """
    plain, rounded = (AutoModelForCausalLM.from_pretrained(model_folder) for _ in range(2))
    weights = {n: w for n, w in plain.named_parameters() if "proj" in n}
    assert quantize(rounded, bits, group_size) == sum(w.numel() for w in weights.values())
    after = dict(rounded.named_parameters())
    for name, weight in plain.named_parameters():
        if name not in weights:
            assert torch.equal(after[name], weight)
            continue
        groups = weight.reshape(-1, group_size or weight.shape[1])
        found = after[name].reshape(groups.shape)
        step = groups.abs().amax(dim=1, keepdim=True) / ((2**bits - 1) / 2)
        assert ((found - groups).abs() <= 0.501 * step).all()
        assert max(len(group.unique()) for group in found) <= 2**bits
        assert not torch.equal(found, groups)


def test_what_cannot_be_rounded(make_model: Callable[..., Path]):
    model = AutoModelForCausalLM.from_pretrained(make_model(0))
    for size, fitting in ((24, 16), (1000, 32), (9, 8)):
        # 32 inputs of attention and the first feed-forward matrices, 64 of the second: divisors of 32 fit all.
        message = rf"--group_size {size} does not divide the 32 inputs of model.layers.0.* of 32, such as {fitting}$"
        with pytest.raises(UserError, match=message):
            quantize(model, 4, size)
    odd = AutoModelForCausalLM.from_pretrained(make_model(0, intermediate_size=72))
    with pytest.raises(
        UserError, match=r"--group_size 32 does not divide the 72 inputs of .* a divisor of 8, such as 8$"
    ):
        quantize(odd, 4, 32)
    # Its layers are convolutions in name.
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8))
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layer"):
        quantize(other, 8)


def test_command(
    run_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Every metric again; 8 bits change little, and what is there is not evaluated again."""
    from simnpo_pl.studies import quantize as module

    folder = tmp_path / "unlearned"
    main(["fit", *run_options, "--run_dir", str(folder), "--trainer.max_epochs", "1", "--eval.start", "false"])
    main(["quantize", str(folder), "--debug"])
    assert "* rounded weights, forget prob. " in (folder / "model" / "README.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    final = results["final"]["metrics"]
    assert set(results["quantized"]) == {"8-bit", "4-bit group=32"}
    for entry in results["quantized"].values():
        assert entry["metrics"].keys() == final.keys()
        assert entry["counts"] == results["counts"]
        assert entry["metrics"] != final
    assert results["quantized"]["8-bit"]["metrics"]["forget/probability"] == pytest.approx(
        final["forget/probability"], rel=0.1
    )
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| unlearned | SimNPO |")]
    assert [line.split(" | ")[2] for line in table] == ["as exported", "8-bit", "4-bit group=32"]

    def refuse(*args: Any) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(module, "reopen", refuse)
    main(["quantize", str(folder), "--debug"])
    with pytest.raises(SystemExit):
        main(["quantize", str(folder), "--group_size", "0"])
    assert "--group_size: must be at least 1, got 0" in capsys.readouterr().err


def test_metrics_with_gradients_and_on_processes(run_options: list[str], data_folder: Path, tmp_path: Path):
    """Rounded weights are ordinary tensors: all have a gradient, and DDP broadcasts them."""
    (tmp_path / "holdout.json").write_text("\n".join((data_folder / "retain90.json").read_text().splitlines()[:4]))
    options = ["--data.holdout", str(tmp_path / "holdout.json"), "--eval.gradnorm", "true", "--eval.generate_rows", "0"]
    main(["test", *run_options, *options, "--run_dir", str(tmp_path / "run"), "--debug"])
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    main(["quantize", str(tmp_path / "run"), "--bits", "8", "--debug"])
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    assert run_processes(2, ["quantize", str(tmp_path / "copy"), *two, "--bits", "8"], tmp_path / "log") == 0
    one, several = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "copy"))
    found = one["quantized"]["8-bit"]["metrics"]
    assert found.keys() == one["final"]["metrics"].keys()
    assert found["mia_gradnorm"] == pytest.approx(one["final"]["metrics"]["mia_gradnorm"], abs=0.1)
    assert several["quantized"]["8-bit"]["metrics"] == pytest.approx(found, rel=1e-5)


def test_nf4(model_folder: Path):
    """Each weight is one of 16 values times the largest magnitude of its 64: by hand on the normal quantiles."""
    pytest.importorskip("bitsandbytes")
    plain, rounded = (AutoModelForCausalLM.from_pretrained(model_folder) for _ in range(2))
    assert quantize(rounded, "nf4") == sum(w.numel() for n, w in plain.named_parameters() if "proj" in n)
    after = dict(rounded.named_parameters())
    for name, weight in plain.named_parameters():
        if "proj" not in name:
            assert torch.equal(after[name], weight)
            continue
        blocks, found = weight.reshape(-1, 64), after[name].reshape(-1, 64)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        assert len((found / scale).mul(1e4).round().unique()) <= 16
        # The widest gap between neighbors of the grid is that from -1 to -0.696.
        assert ((found - blocks).abs() <= 0.1525 * scale).all()
        assert not torch.equal(found, blocks)


@pytest.mark.parametrize(("bits", "package", "extra"), [(8, "torchao", "quantize"), ("nf4", "bitsandbytes", "8bit")])
def test_missing_package(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, bits: int | str, package: str, extra: str
):
    monkeypatch.setattr("simnpo_pl.studies.quantize.find_spec", {}.get)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'simnpo_pl\[{extra}\]'$"):
        quantize(model, bits)
