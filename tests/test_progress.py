"""The progress bar: rows per second in an evaluation, steps per second in training."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from rich.progress import Progress

from simnpo_pl.cli.main import UnlearningCLI
from simnpo_pl.runs.progress import ProgressBar, Speed


def test_speed_is_in_rows_where_rows_are_counted():
    with Progress(disable=True) as progress:
        ids = [progress.add_task(name, total=4) for name in ("evaluation", "training")]
        column = Speed(Counter({ids[0]: 120}), "dim")
        evaluation, training = progress.tasks
        evaluation.start_time, progress.get_time = 0.0, lambda: 8.0
        evaluation.stop_time = 8.0
        assert str(column.render(evaluation)) == "15.0 rows/s"
        assert str(column.render(training)) == "0.00it/s"


def test_rows_of_batches_are_counted_by_bar(monkeypatch: pytest.MonkeyPatch):
    bar = ProgressBar()
    bar.disable()
    for kind, rows in (("val", 3), ("val", 4), ("test", 5), ("predict", 6)):
        setattr(bar, f"{kind}_progress_bar_id", kind)
        hook = getattr(bar, f"on_{'validation' if kind == 'val' else kind}_batch_end")
        hook(FakeTrainer, None, None, {"index": range(rows)}, 0)
    assert bar.rows == {"val": 7, "test": 5, "predict": 6}


class FakeTrainer:
    sanity_checking = False


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
