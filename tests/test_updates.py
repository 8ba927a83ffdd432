"""Update rules: by hand, and whatever a run may add to them; tests/test_newer_golden.py has values of public code."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from helpers import history, killed_in_epoch, results, run_processes, same_weights
from simnpo_pl.benchmarks import TofuData
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.lora import LoraOptions
from simnpo_pl.module import GRU, SAM, UpdateRule
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import NPO, PDU, GradDiff
from simnpo_pl.runs.record import Run
from simnpo_pl.utils.errors import UserError

RULES = {"SAM": lambda: SAM(rho=0.5), "GRU": GRU}


def test_gru_by_hand():
    """All of the new gradient: g = (1, 0), e = (-1, 1), so g' = g + 1/2 e. Half of it: e = (0, 1/2), no conflict.

    Then r = (-1, 0): e = (-1/2, 1/4), <g, e> = -1/2, <e, e> = 5/16, g' = g + 8/5 e = (1/5, 2/5).
    """

    def forget() -> list[torch.Tensor]:
        return [torch.tensor([1.0]), torch.tensor([0.0])]

    def retain(x: float, y: float) -> list[torch.Tensor]:
        return [torch.tensor([float(x)]), torch.tensor([float(y)])]

    def combined(rule: GRU, x: float, y: float, weight: float = 0.0) -> list[float]:
        return torch.cat(rule.combine(SimpleNamespace(retain_weight=weight), forget(), retain(x, y))).tolist()

    assert combined(GRU(1.0), -1, 1) == [0.5, 0.5]
    assert combined(GRU(1.0), -1, 1, weight=2.0) == [-1.5, 2.5]
    rule = GRU(0.5)
    assert combined(rule, 0, 1) == [1, 0]
    assert combined(rule, -1, 0) == pytest.approx([0.2, 0.4])
    assert combined(GRU(), 0, 0) == [1, 0]


@pytest.fixture
def fit(data_folder: Path, model_folder: Path) -> Callable[..., Any]:
    """Trains the tiny model on 10 rows; losses of every step and trained weights."""

    def run(rule: UpdateRule | None, per_device: int, objective: Any = None, precision: Any = "32-true", **kw: Any):
        sizes = {"effective_batch": 4, "per_device_batch": per_device}
        data = TofuData(path=str(data_folder), model=str(model_folder), eval=EvalOptions(max_new_tokens=3), **sizes)
        module = UnlearningModule(str(model_folder), objective or GradDiff(), update=rule, lr=1e-2, **kw)
        steps: list[float] = []

        class Keep(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
                if trainer.global_step > len(steps):
                    steps.append(trainer.callback_metrics["train/forget_loss"].item())

        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            precision=precision,
            gradient_clip_val=1.0,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[Keep()],
            **quiet,
        )
        trainer.fit(module, data)
        trained = [p.detach().float().flatten() for n, p in module.policy.named_parameters()]
        return steps, torch.cat(trained)

    return run


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("settings", "within"),
    [
        ({}, 1e-4),
        ({"lora": LoraOptions(rank=4), "objective": NPO()}, 1e-4),
        ({"gradient_checkpointing": True}, 1e-4),
        ({"precision": "bf16-mixed"}, 0.05),
    ],
    ids=["all weights", "adapter", "checkpointing", "bf16-mixed"],
)
def test_effective_batch_may_be_cut_any_way(fit: Any, rule: str, settings: dict[str, Any], within: float):
    whole, trained = fit(RULES[rule](), 4, **settings)
    assert len(whole) == 6
    cut, also = fit(RULES[rule](), 1, **settings)
    assert cut == pytest.approx(whole, rel=within)
    assert (trained - also).norm() < 20 * within * trained.norm()
    plain, _ = fit(None, 4, **settings)
    assert plain[0] == whole[0]
    assert plain[2:] != pytest.approx(whole[2:], rel=1e-3)


@pytest.mark.parametrize("settings", [lambda: {"retain_weight": 0.0}, lambda: {"objective": PDU(warmup_epochs=0)}])
def test_sam_without_retain_loss_and_with_a_dual_variable(fit: Any, settings: Callable[[], dict[str, Any]]):
    whole, _ = fit(SAM(rho=0.5), 4, **settings())
    assert fit(SAM(rho=0.5), 1, **settings())[0] == pytest.approx(whole, rel=1e-4)


@pytest.fixture(scope="module")
def options(run_options: list[str]) -> list[str]:
    """A run without evaluations."""
    skipped = [word for name in ("start", "final") for word in (f"--eval.{name}", "false")]
    return ["fit", *run_options, *skipped, "--model.objective", "NPO", "--trainer.limit_val_batches", "0"]


@pytest.mark.parametrize("rule", RULES)
def test_two_processes_do_what_one_does(options: list[str], rule: str, tmp_path: Path):
    """With an adapter, checkpointing and two micro-batches a step."""
    from simnpo_pl.__main__ import main

    method = ["--model.update", rule, "--model.gradient_checkpointing", "true", "--model.lora.rank", "4"]
    run = [*options, *method, "--data.per_device_batch", "1"]
    main([*run, "--run_dir", str(tmp_path / "one"), "--debug"])
    two = ["--config", "configs/hardware/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    assert run_processes(2, [*run, *two, "--run_dir", str(tmp_path / "two")], tmp_path / "log") == 0
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    one, other = (load_causal_lm(str(tmp_path / name / "model")).state_dict() for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-3)


def test_killed_run_resumes(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With the moving average of the retain gradient, to the bit; and the plan says what a step costs."""
    from simnpo_pl.__main__ import main

    run = [*options, "--model.update", "GRU", "--debug"]
    main([*run, "--run_dir", str(tmp_path / "whole")])
    shown = capsys.readouterr().out
    assert "update: one forward pass, two backward passes; two more copies" in shown
    assert "update rule 0." in shown
    found = Run("whole", tmp_path / "whole", results(tmp_path / "whole"))
    assert (found.method, found.settings) == ("NPO+GRU", "beta 0.1, newest 0.8; forget weight 1, retain weight 0 (NLL)")
    cut = [*run, "--run_dir", str(tmp_path / "cut")]
    with killed_in_epoch(2):
        main(cut)
    main([*cut, "--ckpt_path", "last"])
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.dtype", "bfloat16"], "--model.update SAM needs weights in float32: leave out --model.dtype"),
        (
            ["--config", "configs/hardware/fsdp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "1"],
            "--model.update SAM needs whole gradients on every device: give --trainer.strategy ddp or auto",
        ),
        (["--model.update.rho", "0"], "--model.update.rho must be a number above 0, got 0.0"),
        (["--model.update", "ASAM"], "no such class; the nearest is SAM; known are GRU, SAM"),
    ],
)
def test_what_cannot_work_is_refused(
    options: list[str], words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from simnpo_pl.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main([*options, "--model.update", "SAM", *words, "--run_dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_scaled_losses_are_refused():
    """On a CPU Lightning replaces this precision."""
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy(), precision="16-mixed")
    with pytest.raises(
        UserError, match=r"--model.update GRU does not support the scaled losses of 16-mixed: give bf16"
    ):
        GRU().check(trainer, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retain_loss": None}, "--model.update GRU reads the gradient of a retain loss: name one"),
        ({"objective": PDU()}, "--model.update GRU does not know how to bound the retain loss, as --model.objective"),
    ],
)
def test_gru_needs_a_plain_retain_loss(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        UnlearningModule("MODEL", update=GRU(), **settings)
    with pytest.raises(UserError, match=r"--model.update.newest must be above 0 and at most 1, got 0"):
        GRU(0)
    with pytest.raises(TypeError, match="UpdateRule must implement combine"):
        UpdateRule().combine(None, [], [])
