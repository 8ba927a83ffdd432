"""Several processes do what one does: the same losses and metrics, every row exactly once, however it is shared."""

import json
import os
import pickle
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.strategies import DeepSpeedStrategy
from safetensors.torch import load_file

from helpers import history, results, run_processes, same_run
from simnpo_pl.data.pairing import PairedSampler
from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import scoring_parts
from simnpo_pl.evaluation.plan import Split, scoring_batches, share_of
from simnpo_pl.metrics.answers import AnswerProbability
from simnpo_pl.metrics.base import first_seen
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.models.reference import Reference
from simnpo_pl.models.sharding import SafeReader
from simnpo_pl.module.policy import check_trainer
from simnpo_pl.utils.errors import UserError

METHODS = {
    "all weights, cached reference": ["--model.objective", "NPO"],
    "all weights, resident reference": ["--model.objective", "SimNPO", "--model.retain_loss", "KL"],
    "adapter, its base as reference": [
        *("--model.objective", "NPO", "--model.retain_loss", "KL", "--model.lora.rank", "4"),
    ],
    "gradient checkpointing": ["--model.objective", "NPO", "--model.gradient_checkpointing", "true"],
    "some weights": [
        *("--model.objective", "RMU", "--model.objective.layer", "1"),
        *("--model.retain_loss", "EmbedDiff", "--model.retain_loss.layer", "1"),
    ],
}
FAST = ("all weights, cached reference", "some weights")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def one_process(
    run_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[list[str], Path]]:
    """Options of a method, and its run on one process, made once."""
    from simnpo_pl.__main__ import main

    made: dict[str, tuple[list[str], Path]] = {}

    def run(method: str) -> tuple[list[str], Path]:
        if method not in made:
            folder = tmp_path_factory.mktemp("one") / "run"
            fixed = ["--eval.cache_dir", "null", "--data.per_device_batch", "1"]
            options = ["fit", *run_options, *METHODS[method], *fixed]
            main([*options, "--run_dir", str(folder), "--debug"])
            made[method] = options, folder
        return made[method]

    return run


def same_results(one: Path, several: Path) -> None:
    """Losses of every step, all metrics, the rows in their order."""
    for a, b in zip(history(several), history(one), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    ours, theirs = results(several), results(one)
    assert ours["counts"] == theirs["counts"]
    for a, b in zip([ours["start"], *ours["epochs"]], [theirs["start"], *theirs["epochs"]], strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=2e-3, abs=1e-6)
    rows = [[json.loads(line) for line in (f / "rows.jsonl").read_text().split("\n") if line] for f in (one, several)]
    assert [(r["split"], r["index"], r["question"]) for r in rows[0]] == [
        (r["split"], r["index"], r["question"]) for r in rows[1]
    ]
    assert all("generation" in row for row in rows[1])
    models = [load_causal_lm(str(folder / "model")).state_dict() for folder in (one, several)]
    assert models[0].keys() == models[1].keys()
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=SLOW) for m in METHODS])
def test_weights_sharded_on_two_processes(one_process: Any, tmp_path: Path, method: str):
    """FSDP2: sharded checkpoint, gathered export."""
    options, one = one_process(method)
    folder = tmp_path / "run"
    shared = ["--config", "configs/hardware/fsdp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    assert run_processes(2, [*options, *shared, "--run_dir", str(folder)], tmp_path / "log") == 0
    same_results(one, folder)
    assert {f.name for f in (folder / "last.ckpt").iterdir()} == {
        ".metadata",
        "meta.pt",
        "__0_0.distcp",
        "__1_0.distcp",
    }
    saved = SafeReader(folder / "last.ckpt").read_metadata().state_dict_metadata
    weights = [name for name in saved if name.startswith("state_dict.")]
    assert weights
    assert all(".lora_" in name for name in weights) is ("adapter" in method)


def test_resident_reference_without_a_start_evaluation(one_process: Any, tmp_path: Path):
    """FSDP2 shards the reference as it sharded the policy, also before the first evaluation."""
    options, one = one_process("all weights, resident reference")
    shared = ["--config", "configs/hardware/fsdp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    shared += ["--eval.start", "false", "--run_dir", str(tmp_path / "run")]
    assert run_processes(2, [*options, *shared], tmp_path / "log") == 0
    for a, b in zip(history(tmp_path / "run"), history(one), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@SLOW
def test_weights_sharded_under_bfloat16_autocast(one_process: Any, tmp_path: Path):
    """Weights, their export and the checkpoint stay in float32."""
    options, one = one_process("all weights, cached reference")
    folder = tmp_path / "run"
    overlays = [w for name in ("fsdp", "bf16", "checkpointing") for w in ("--config", f"configs/hardware/{name}.yaml")]
    shared = [*overlays, "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--run_dir", str(folder)]
    assert run_processes(2, [*options, *shared], tmp_path / "log") == 0
    for a, b in zip(history(folder)[:2], history(one)[:2], strict=True):
        assert a == pytest.approx(b, rel=0.05)
    assert {weight.dtype for weight in load_file(folder / "model" / "model.safetensors").values()} == {torch.float32}
    assert results(folder)["finished"]


@pytest.mark.parametrize(
    ("processes", "method"),
    [
        (4, "all weights, cached reference"),
        pytest.param(2, "all weights, cached reference", marks=SLOW),
        pytest.param(4, "adapter, its base as reference", marks=SLOW),
    ],
)
def test_a_copy_on_each_of_several_processes(one_process: Any, tmp_path: Path, method: str, processes: int):
    """DDP, at the same effective batch."""
    options, one = one_process(method)
    folder = tmp_path / "run"
    copies = ["--config", "configs/hardware/ddp.yaml", "--trainer.accelerator", "cpu"]
    copies += ["--trainer.devices", str(processes), "--run_dir", str(folder)]
    assert run_processes(processes, [*options, *copies], tmp_path / "log") == 0
    same_results(one, folder)


@SLOW
def test_sharded_run_resumes_after_a_kill(one_process: Any, tmp_path: Path):
    """Bit for bit on as many processes; and from the end of an epoch on one alone."""
    options, one = one_process("all weights, cached reference")
    shared = ["--config", "configs/hardware/fsdp.yaml", "--trainer.accelerator", "cpu"]
    runs = {name: [*options, *shared, "--run_dir", str(tmp_path / name)] for name in ("whole", "cut")}
    two = ["--trainer.devices", "2", "--checkpoint.every_steps", "1"]
    assert run_processes(2, [*runs["whole"], *two], tmp_path / "log") == 0

    def kill(children: list[int]) -> None:
        while not (tmp_path / "cut" / "last.ckpt").exists():
            time.sleep(0.01)
        for child in children:
            os.kill(child, signal.SIGKILL)

    assert run_processes(2, [*runs["cut"], *two], tmp_path / "log", kill) == -signal.SIGKILL
    assert run_processes(2, [*runs["cut"], *two, "--ckpt_path", "last"], tmp_path / "log") == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")

    more = ["--ckpt_path", str(tmp_path / "whole" / "last.ckpt"), "--trainer.max_epochs", "3", "--trainer.devices", "1"]
    assert run_processes(1, [*options, *shared, *more, "--run_dir", str(tmp_path / "more")], tmp_path / "more.log") == 0
    assert [epoch["epoch"] for epoch in results(tmp_path / "more")["epochs"]] == [3]
    assert history(tmp_path / "more")[0]["loss"] < history(one)[0]["loss"]


@SLOW
def test_signal_to_one_process_stops_all(one_process: Any, tmp_path: Path):
    """They agree on the step after which the state is saved."""
    options, one = one_process("all weights, cached reference")
    folder = tmp_path / "cut"
    copies = ["--config", "configs/hardware/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    run = [*options, *copies, "--checkpoint.every_steps", "1", "--run_dir", str(folder)]

    def stop(children: list[int]) -> None:
        while not (folder / "last.ckpt").exists():
            time.sleep(0.01)
        os.kill(children[1], signal.SIGTERM)

    assert run_processes(2, run, tmp_path / "log", stop) == 128 + signal.SIGTERM
    assert f"--run_dir {folder} --ckpt_path last" in (tmp_path / "log.0").read_text()
    assert not results(folder)["finished"]
    assert run_processes(2, [*run, "--ckpt_path", "last"], tmp_path / "log") == 0
    same_results(one, folder)


# -- without processes ---------------------------------------------------------------------------------------


def row_of(length: int) -> TokenRow:
    return TokenRow(list(range(1, length + 1)), [-100, *range(2, length + 1)])


@pytest.mark.parametrize("rows", [100, 117, 300, 400])
@pytest.mark.parametrize("world", [3, 4, 7])
def test_every_row_is_trained_on_once_an_epoch(rows: int, world: int):
    """Fillers keep the processes in step and do not count."""
    samplers = [PairedSampler(rows, 3 * rows, world * 4, 2, world, rank) for rank in range(world)]
    taken = [list(sampler) for sampler in samplers]
    assert len({len(batches) for batches in taken}) == 1
    seen = Counter(
        row for batches in taken for b in batches for row, real in zip(b.forget, b.real, strict=True) if real
    )
    assert seen == Counter(range(rows))


@pytest.mark.parametrize("rows", [100, 117, 300, 400])
def test_every_row_counts_once_on_any_number_of_processes(rows: int):
    """World sizes that do not divide the rows: equally many batches each, merged tables with every row once."""
    answers = [[row_of(3 + (7 * i) % 23), row_of(4 + i % 5)] for i in range(rows)]
    part = Split("x", [{} for _ in answers], answers, {})
    batches = scoring_batches([part], 300)
    expected = torch.arange(rows) / rows
    for world in (1, 2, 3, 4, 7, 8, 16, 64):
        shares = [share_of(batches, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        for turn in zip(*shares, strict=True):
            assert [batch["number"] for batch in turn] == list(turn[0]["turn"])
        metrics = []
        for share in shares:
            metric = AnswerProbability(rows)
            for batch in share:
                metric.update(batch["index"], batch["kind"], {"nll": batch["index"] / rows})
            metrics.append(metric)
        merged = AnswerProbability(rows)
        merged.table = first_seen(torch.stack([metric.table for metric in metrics]))
        merged._update_count = 1
        result = merged.compute()
        assert result["n"] == rows
        assert result["value"] == pytest.approx(torch.exp(-expected).double().mean().item(), rel=1e-6)
        first = {batch["number"]: batch for share in shares for batch in share}
        cells = Counter(
            (i, k)
            for batch in first.values()
            for i, k in zip(batch["index"].tolist(), batch["kind"].tolist(), strict=True)
        )
        assert cells == Counter((i, k) for i in range(rows) for k in range(2))


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 12), world=st.integers(1, 5))
def test_reference_rows_are_shared_among_processes(rows: int, world: int, model_folder: Path):
    """Every row is scored by one process, the sum over processes is what one process finds."""
    scorer = _scorer(model_folder)
    encoded = [row_of(4 + i % 6) for i in range(rows)]
    batches = list(scoring_parts(encoded, "forget", tokens=18))
    found = []
    for rank in range(world):
        strategy = SimpleNamespace(global_rank=rank, world_size=world, reduce=lambda value, reduce_op: value)
        reference = Reference("x", "--model.name", lambda *a, **k: None)
        reference.fill(batches, scorer, "cpu", strategy)
        found.append(reference.totals["forget"])
    alone = torch.stack(
        [scorer({"x": batch["forget"]})["x"].logps().total for batch in scoring_parts(encoded, "forget", 1)]
    )
    order = torch.cat([batch["forget"]["index"] for batch in scoring_parts(encoded, "forget", 1)])
    torch.testing.assert_close(sum(found)[order], alone.flatten().detach(), rtol=1e-4, atol=1e-5)
    assert all((torch.stack(found) != 0).sum(dim=0) == 1)


_scorers: dict[Path, Scorer] = {}


def _scorer(folder: Path) -> Scorer:
    if folder not in _scorers:
        _scorers[folder] = Scorer(load_causal_lm(str(folder)))
    return _scorers[folder]


class _Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(os.environ["EVIL"]),)


def test_index_of_a_sharded_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    for content in (pickle.dumps(_Evil()), b"", b"no pickle", pickle.dumps(eval)):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match="no index of a checkpoint"):
            SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_a_refusal_ends_all_processes(run_options: list[str], tmp_path: Path):
    """Before they meet: one that was not refused would wait for the others."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"finished": true}')
    options = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--run_dir", str(tmp_path / "run")]
    assert run_processes(2, ["fit", *run_options, *options], tmp_path / "log", seconds=60) == 2
    for rank in range(2):
        assert "run holds a finished run: give another folder" in (tmp_path / f"log.{rank}").read_text()


def test_file_is_no_sharded_checkpoint(run_options: list[str], tmp_path: Path):
    (tmp_path / "last.ckpt").write_bytes(b"x")
    options = ["--trainer.strategy", "fsdp2", "--trainer.devices", "1", "--eval.start", "false"]
    options += ["--ckpt_path", str(tmp_path / "last.ckpt"), "--run_dir", str(tmp_path / "run")]
    assert run_processes(1, ["fit", *run_options, *options], tmp_path / "log") == 2
    assert "is no complete checkpoint of a sharded run" in (tmp_path / "log.0").read_text()


def test_deepspeed_is_refused():
    """Lightning's own hooks would be called for every micro-batch."""
    trainer: Any = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy), precision="32-true")
    with pytest.raises(UserError, match="DeepSpeed, whose steps are micro-batches, is not supported: give fsdp2"):
        check_trainer(trainer)
