"""Everything that runs on a GPU runs on a second device that is not the CPU: no test here needs a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from device_checks import NAMES, DeviceChecks, Step
from helpers import command_on_gpu, history, on_second_device, results

BUDGET = {"step": 1, "scores": 1, "token": 1.4}
"""Host waits of SimNPO with NLL: of an optimizer step, of a scored batch with its metrics, of a generated token.

The first of five tokens also asks, in some batches twice, whether a prompt is padded."""


def mixed() -> None:
    """What CUDA refuses, this device refuses, and what makes the host wait is counted."""
    import second_device

    here, there = torch.arange(6.0), torch.arange(6.0, device=second_device.DEVICE)
    refused = [lambda: here + there, lambda: here[there > 2], lambda: torch.cat([here, there])]
    refused += [lambda: there.masked_fill(here > 2, 0.0), lambda: here.index_add(0, there.long(), there)]
    for mix in refused:
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert there[here > 2].tolist() == [3.0, 4.0, 5.0]
    assert (there * torch.tensor(2.0)).tolist() == (here * 2).tolist()
    calls = {"item": lambda: there.sum().item(), "to host": lambda: there.cpu(), "nonzero": lambda: there[there > 2]}
    calls |= {"unique": lambda: there.unique(return_inverse=True)}
    for kind, call in calls.items():
        with second_device.host_waits() as seen:
            call()
            here.sum().item()
            there + there
        assert dict(seen) == {(kind, "elsewhere"): 1}
    with torch.autocast(second_device.NAME, torch.bfloat16):
        product = there.view(2, 3) @ there.view(3, 2)
        assert (product.dtype, product.exp().dtype) == (torch.bfloat16, torch.float32)


def test_devices_do_not_mix():
    code, text = on_second_device(mixed)
    assert code == 0, text


class TestSecondDevice(DeviceChecks):
    device_type = "second"
    run = staticmethod(lambda arguments: on_second_device(command_on_gpu, arguments))

    def test_in_float32_a_run_is_that_of_the_cpu(self, common: list[str], tmp_path: Path):
        for name, options in (
            ("cpu", ["--trainer.accelerator", "cpu"]),
            ("second", ["--trainer.precision", "32-true"]),
        ):
            folder = tmp_path / name
            options = [*options, "--model.objective", "NPO", "--model.retain_loss", "KL"]
            text = self.call("fit", *common, *options, "--eval.start", "false", "--run_dir", folder)
            assert f", {name}" in text
        one, other = (results(tmp_path / name)["final"]["metrics"] for name in ("cpu", "second"))
        assert one == pytest.approx(other, rel=1e-4, nan_ok=True)
        for step, its in zip(history(tmp_path / "cpu"), history(tmp_path / "second"), strict=True):
            assert step == pytest.approx(its, rel=1e-4, abs=1e-7)

    @pytest.mark.parametrize(
        ("options", "budget"),
        [
            ([], BUDGET),
            (["--model.objective", "NPO", "--model.retain_loss", "KL"], {"step": 1}),
            (["--model.objective", "JensUn", "--model.retain_loss", "JSD", "--model.update", "SAM"], {"step": 1}),
            (["--model.objective", "IHL", "--model.update", "GRU"], {"step": 1}),
        ],
        ids=["SimNPO", "NPO and KL", "JensUn, JSD, SAM", "IHL, GRU"],
    )
    def test_host_waits(self, common: list[str], tmp_path: Path, options: list[str], budget: dict[str, float]):
        """Bounds that may only fall: what a step, a batch of answers scored and a generated token wait for."""
        file = tmp_path / "waits.jsonl"
        waits = ["--trainer.callbacks", "second_device.Waits", "--trainer.callbacks.file", file]
        options = [*options, "--data.effective_batch", "2", "--eval.start", "false", "--eval.cache_dir", "null"]
        options += ["--eval.prompts_per_batch", "8"]
        options += [] if "token" in budget else ["--trainer.limit_val_batches", "0", "--eval.final", "false"]
        self.call("fit", *common, *options, *waits, "--run_dir", tmp_path / "run")
        found = [json.loads(line) for line in file.read_text().splitlines()]
        for kind, bound in budget.items():
            # The first batch also tests how the model can be run.
            counts = [entry for entry in found if entry[0] == kind]
            for _, count, lines in counts[1:] or counts:
                assert 0 < count <= bound, (kind, count, lines)


def compare(folders: list[Path]) -> None:
    """Print what differs from the CPU, by objective."""
    import second_device

    step = Step(folders)
    print(json.dumps({name: step.differences(second_device.DEVICE, name) for name in NAMES}))


@pytest.fixture(scope="module")
def differences(make_model: Callable[..., Path]) -> dict[str, str]:
    """Objective to what differs from the CPU, found in one process."""
    code, text = on_second_device(compare, [make_model(seed, num_hidden_layers=1) for seed in range(3)])
    assert code == 0, text
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("objective", NAMES)
def test_losses_agree_with_the_cpu(differences: dict[str, str], objective: str):
    assert not differences[objective]


def run_in_tf32(folder: Path) -> None:
    """Score rows with products of matrices that err by 2^-11 of their size, as TF32's do, in each shape otherwise."""
    from torch.nn import functional as F

    import second_device
    from simnpo_pl.models.loading import load_causal_lm
    from simnpo_pl.models.logprobs import Scorer

    linear, noise = F.linear, torch.Generator().manual_seed(0)

    def rounded(*args: torch.Tensor) -> torch.Tensor:
        product = linear(*args)
        errors = torch.empty(product.shape).uniform_(-1, 1, generator=noise).to(product.device)
        return product * (1 + errors / 2**11)

    F.linear = rounded
    model = load_causal_lm(str(folder)).to(second_device.DEVICE)
    ids = torch.randint(3, 100, (4, 60), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(60) < 20, -100)
    rows = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    scorer = Scorer(model)
    with torch.no_grad():
        logps = scorer({"rows": {key: value.to(second_device.DEVICE) for key, value in rows.items()}})["rows"].logps()
    F.linear = linear
    with torch.no_grad():
        exact = Scorer(model.to("cpu"))({"rows": rows})["rows"].logps()
    difference = (logps.mean.cpu() - exact.mean).abs().max()
    assert 1e-5 < difference < 1e-2, difference
    assert scorer.forward.way == "packed"


def test_rows_stay_packed_in_tf32(make_model: Callable[..., Path]):
    """The check of packed rows allows for what TF32 rounds, which is more than float32 does."""
    code, text = on_second_device(run_in_tf32, make_model(0, hidden_size=128, num_hidden_layers=4))
    assert code == 0, text
