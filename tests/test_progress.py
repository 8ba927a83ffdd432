"""The progress bar: one in a run, one line, with time left and the losses by name."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from simnpo_pl.cli.main import UnlearningCLI
from simnpo_pl.cli.summary import say


def test_bars_of_a_run(cli: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each shows its last state: the start model, then both epochs in one; 80 columns are enough."""
    output = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=output, width=80))
    options = ["--run_dir", str(tmp_path / "run"), "--eval.generate_rows", "1", "--trainer.enable_progress_bar", "true"]
    cli("fit", *options)
    start, training = output.getvalue().splitlines()
    assert re.fullmatch(r"evaluating start model ━{16} (\d+)/\1 0:\d\d:\d\d *", start)
    assert re.fullmatch(r"epoch 2 of 2 ━{16} 6/6 0:\d\d:\d\d forget \d\.\d{3}  retain \d\.\d{3} *", training)
    output.truncate(0)
    cli("test", *options[2:], "--run_dir", str(tmp_path / "test"))
    assert "evaluating model" in output.getvalue()


def test_bars_of_every_model(
    cli: Callable[..., None], other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also of models that give no metrics by themselves."""
    output = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=output, width=80))
    options = ["--eval.retrained", str(other_folder), "--eval.depth", "true", "--model.objective", "AltPO"]
    options += ["--trainer.enable_progress_bar", "true", "--eval.generate_rows", "1", "--trainer.max_epochs", "1"]
    cli("fit", *options, "--run_dir", str(tmp_path / "run"))
    bars = [line.split(" ━")[0] for line in output.getvalue().splitlines()]
    for bar in ("answers of the start model", "retrained model", "start model", "depth of unlearning"):
        assert f"evaluating {bar}" in bars


def test_lines_break_between_words_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    text = "data: 60 forget rows, 540 retain rows\n  fluency: no classifier"
    say(text)
    assert capsys.readouterr().out == f"{text}\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    say(text)
    assert capsys.readouterr().out == "data: 60 forget rows, 540\n    retain rows\n  fluency: no classifier\n"


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
