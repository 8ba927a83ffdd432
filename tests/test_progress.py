"""The progress bar: names of the losses, and one bar in a run."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.cli import LightningCLI

from simnpo_pl.cli.main import UnlearningCLI
from simnpo_pl.runs.progress import ProgressBar


def test_losses_have_short_names(monkeypatch: pytest.MonkeyPatch):
    metrics = {"v_num": "", "train/loss": 1.5, "train/forget_loss": 0.5, "train/retain_loss": 1.0}
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda *_: metrics)
    shown = ProgressBar().get_metrics(None, None)
    assert shown == {"v_num": "", "loss": 1.5, "forget": 0.5, "retain": 1.0}


class Mine(Callback):
    """One callback of a user's own."""


@pytest.mark.parametrize(
    ("options", "bars"),
    [
        ([], {"ProgressBar"}),
        (["--trainer.callbacks", "test_progress.Mine"], {"ProgressBar"}),
        (["--trainer.callbacks", "lightning.pytorch.callbacks.TQDMProgressBar"], {"TQDMProgressBar"}),
        (["--trainer.enable_progress_bar", "false"], set()),
    ],
)
def test_a_run_has_one_bar(
    options: list[str], bars: set[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, name: None)
    words = ["test", "--config", "configs/demo.yaml", "--model.name", str(model_folder)]
    found: Any = UnlearningCLI([*words, "--run_dir", str(tmp_path / "run"), *options])
    names = [type(callback).__name__ for callback in found.trainer.callbacks]
    assert {name for name in names if "ProgressBar" in name} == bars
    assert ("Mine" in names) == ("test_progress.Mine" in options)
