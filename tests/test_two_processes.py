"""Objectives that read other models, layers or their own past: two processes train as one does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import history, results

CASES = {
    "PDU": ["--model.objective.warmup_epochs", "0", "--model.objective.eps", "1"],
    "RMU": ["--model.objective.layer", "1", "--model.retain_loss", "EmbedDiff", "--model.retain_loss.layer", "1"],
    "RKLD": ["--model.objective.alpha", "2"],
    "NPORawLogits": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("objective", CASES)
def test_losses_and_dual_variable(
    run_options: list[str], cli: Callable[..., None], other_folder: Path, tmp_path: Path, objective: str
):
    """Nine rows in steps of four: in the last one a process has a filler row, which must not count."""
    options = ["--model.objective", objective, *CASES[objective], "--data.train_split", "forget10[:9]"]
    options += ["--model.reference", str(other_folder), "--model.memorizing", str(other_folder)]
    options += ["--eval.start", "false", "--eval.final", "false", "--trainer.check_val_every_n_epoch", "9"]
    one, two = tmp_path / "one", tmp_path / "two"
    cli("fit", *options, "--run_dir", str(one))
    command = [sys.executable, "-m", "simnpo_pl", "fit", *run_options, *options, "--run_dir", str(two), "--debug"]
    command += ["--config", "configs/hardware/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert results(two)["finished"]
    steps = list(zip(history(one), history(two), strict=True))
    assert len(steps) == 6
    for ours, theirs in steps:
        assert theirs == pytest.approx(ours, rel=1e-4)
    if objective == "PDU":
        assert steps[-1][0]["dual"] > 1.5
