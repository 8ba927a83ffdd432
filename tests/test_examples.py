"""The examples that the documentation shows: each runs, and does what its page says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from simnpo_pl.models.logprobs import AnswerLogps
from simnpo_pl.objectives import ForgetInputs

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_hinge_by_hand():
    """Means -1 and -4 nats per token against a floor of -3: losses 2 and 0."""
    from hinge import HingeAscent

    logps = AnswerLogps(torch.tensor([-2.0, -12.0]), torch.tensor([2.0, 3.0]))
    assert HingeAscent(-3.0)(ForgetInputs(forget=logps)).tolist() == [2.0, 0.0]


def test_objective_from_outside(cli: Callable[..., None], tmp_path: Path):
    options = ["--model.objective", "hinge.HingeAscent", "--model.objective.floor", "-20"]
    cli("fit", *options, "--run_dir", str(tmp_path / "run"), "--eval.generate_rows", "1")
    content = results(tmp_path / "run")
    assert content["objective"]["name"] == "HingeAscent"
    assert content["objective"]["settings"] == {"floor": -20}
    assert content["final"]["metrics"]["forget/probability"] < content["start"]["metrics"]["forget/probability"]


def test_benchmark_and_metric_from_outside(model_folder: Path, tmp_path: Path):
    from simnpo_pl.__main__ import main

    os.environ.pop("SIMNPO_PL_RUN_DIR", None)
    options = ["--data", "capitals.CapitalsData", "--model.name", str(model_folder), "--data.effective_batch", "2"]
    options += ["--data.per_device_batch", "2"]
    options += ["--trainer.max_epochs", "2", "--model.lr", "1e-2", "--eval.cache_dir", "null"]
    options += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", *options, "--eval.max_new_tokens", "5", "--run_dir", str(tmp_path / "run"), "--debug"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    forget = [row for row in rows if row["split"] == "forget"]
    assert [row["answer"] for row in forget] == ["It is Paris.", "It is Tokyo."]
    final = results(tmp_path / "run")["final"]["metrics"]
    worst = max(torch.exp(-torch.tensor(row["answer_nll"])).item() for row in forget)
    assert final["forget/worst_probability"] == pytest.approx(worst, rel=1e-5)


@pytest.mark.slow
def test_quickstart_script(tmp_path: Path):
    """As a program, as its page says."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    shown = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
    before, after = map(float, shown["forget/probability"].split(" -> "))
    assert before > 0.9
    assert after < 0.1
    assert "parameters" in shown["written"]
