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


def test_metric_by_config(cli: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A metric that no benchmark knows, twice: in results, by row, in the terminal and in the logger."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tmp_path / "metrics.yaml"
    config.write_text(
        "eval:\n  metrics:\n  - {class_path: worst.WorstProbability, split: forget}\n"
        "  - {class_path: simnpo_pl.metrics.answers.RowMean, split: retain, name: found, "
        "init_args: {feature: rouge1_recall}}\n"
    )
    folder = tmp_path / "run"
    cli("test", "--config", str(config), "--eval.generate_rows", "2", "--run_dir", str(folder))
    content = results(folder)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    by_row = [row["worst_probability"] for row in rows if row["split"] == "forget"]
    worst = content["final"]["metrics"]["forget/worst_probability"]
    assert worst == max(by_row)
    assert worst == pytest.approx(max(torch.exp(-torch.tensor(row["answer_nll"])).item() for row in rows[:10]))
    assert content["counts"]["forget/worst_probability"] == 10
    assert content["titles"]["forget/worst_probability"]["short"] == "forget worst prob."
    found = [row["rouge1_recall"] for row in rows if row["split"] == "retain" and "generation" in row]
    assert content["final"]["metrics"]["retain/found"] == pytest.approx(sum(found) / 2)
    assert "\n  forget worst prob. " in capsys.readouterr().out
    logged = EventAccumulator(str(folder / "final")).Reload()
    assert logged.Scalars("forget/worst_probability")[-1].value == pytest.approx(worst)
    cli("test", "--config", str(config), "--eval.generate_rows", "0", "--run_dir", str(tmp_path / "silent"))
    silent = results(tmp_path / "silent")["unavailable"]
    assert silent["retain/found"] == "no answers are generated, see --eval.generate_rows"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{class_path: worst.WorstProbability}",
            "--eval.metrics: expected entries with class_path and split, optional",
        ),
        (
            "{class_path: worst.WorstProbability, split: forgotten}",
            "no split 'forgotten'; this benchmark measures forget",
        ),
        ("{class_path: worst.Nothing, split: forget}", "worst.Nothing: no such class"),
        ("{class_path: torch.Tensor, split: forget}", "expected a subclass of simnpo_pl.metrics.base.RowMetric"),
        ("{class_path: simnpo_pl.metrics.answers.RowMean, split: forget}", "RowMean: cannot be built with rows"),
        ("{class_path: worst.WorstProbability, split: forget, name: rouge}", "forget/rouge is measured already"),
    ],
)
def test_mistakes_in_metrics(cli_error: Callable[..., str], tmp_path: Path, entry: str, message: str):
    assert message in cli_error("test", "--eval.metrics", f"[{entry}]", "--run_dir", str(tmp_path / "run"))
