"""What chance does to numbers over few rows: intervals, and what forget quality can tell; in a run and its report."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import results
from simnpo_pl.__main__ import main
from simnpo_pl.metrics.answers import ForgetQuality, RowMean, TruthRatio
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.chance import forget_quality_chance, interval
from simnpo_pl.runs.verdict import verdict

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def test_interval_of_a_share():
    """30 of 100: the standard error is the root of 0.3 * 0.7 / 100, 0.0458."""
    values = torch.tensor([1.0] * 30 + [0.0] * 70)
    low, high = interval(values)
    assert (low, high) == pytest.approx((0.3 - 1.96 * 0.0458, 0.3 + 1.96 * 0.0458), abs=0.015)
    assert interval(values) == (low, high)
    assert interval(torch.ones(5)) == (1.0, 1.0)
    lows, highs = interval(torch.stack([torch.ones(100), values], dim=1))
    assert (lows, highs) == ([1.0, low], [1.0, high])


def filled(metric: RowMetric, scores: list[list[float]], feature: str = "nll") -> RowMetric:
    for kind, values in enumerate(zip(*scores, strict=True)):
        index = torch.arange(len(values))
        metric.update(index, torch.full_like(index, kind), {feature: torch.tensor(values)})
    metric.compute()
    return metric


def test_only_means_over_rows_have_an_interval():
    scaled = filled(RowMean("s", rows=2, scale=100.0), [[0.5], [0.5]], "s")
    assert scaled.interval() == (50.0, 50.0)
    # R = exp(-(2 - 1)) in each row, so 1 - R and min(R, 1/R) are the same for both.
    rows = [[1.0, 2.0], [2.0, 3.0]]
    ratio = torch.tensor(-1.0).exp().item()
    for goal, value in (("forget", ratio), ("utility", 1 - ratio)):
        metric = filled(TruthRatio(rows=2, kinds=2, aggregate=goal, has_paraphrase=False), rows)
        assert metric.interval() == pytest.approx((value, value))
    assert filled(ForgetQuality(2, 2, torch.ones(2), has_paraphrase=False), rows).interval() is None
    assert filled(RowMean("s", rows=1), [[0.5]], "s").interval() is None
    assert filled(RowMean("s", rows=2), [[0.5], [float("nan")]], "s").interval() is None


def test_chance_of_forget_quality():
    """Of 10 rows 5 below all others give a KS statistic of 0.5 or so, p = 0.17; at 40 rows half is always found."""
    start, retrained = torch.linspace(0.0, 0.1, 50), torch.linspace(1.0, 2.0, 50)
    few, many = (forget_quality_chance(start, retrained, n) for n in (10, 40))
    assert few["n"] == 10
    assert few["half"]["q50"] == pytest.approx(0.168, abs=0.001)
    assert few["power"] < 0.5
    assert many["power"] == 1.0
    # Nearly uniform; at few rows in steps.
    assert many["retrained"]["q05"] == pytest.approx(0.05, abs=0.05)
    assert 0.3 < few["retrained"]["q50"] <= many["retrained"]["q95"]
    # A start model that is no different cannot be told apart, nor can one of whose rows hardly any are left.
    assert forget_quality_chance(retrained, retrained)["power"] < 0.12
    assert forget_quality_chance(start, retrained, 40, left=0.05)["power"] < 0.12


def test_the_verdict_says_what_the_test_could_find():
    metrics = {"forget/probability": 0.9, "forget_quality": 0.7}
    record: dict[str, Any] = {name: {"metrics": metrics} for name in ("start", "retrained", "final")}
    record["forget_quality_chance"] = {"n": 10, "power": 0.155}
    said = "forget quality 0.7: the test finds no difference from the retrained model"
    assert (
        f"{said}; at 10 rows it would tell a half-unlearned model apart 16 times in 100" in verdict(record)["reasons"]
    )
    del record["forget_quality_chance"]
    assert said in verdict(record)["reasons"]


@pytest.fixture(scope="module")
def run(run_options: list[str], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    options = ["--run_dir", str(folder), "--eval.retrained", str(other_folder), "--eval.depth", "true"]
    main(["fit", *run_options, *options, "--trainer.max_epochs", "1", "--debug"])
    return folder


def test_a_run_and_its_report_show_both(run: Path, tmp_path: Path):
    found = results(run)
    assert found["forget_quality_chance"]["n"] == 10
    for model in ("start", "retrained", "final"):
        metrics, intervals = found[model]["metrics"], found[model]["intervals"]
        assert {"forget/probability", "forget/rouge", "forget/truth_ratio", "retain/probability"} <= set(intervals)
        assert not {"forget_quality", "model_utility"} & set(intervals)
        assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    files = [tmp_path / "report.md", tmp_path / "report.html"]
    main(["report", str(run), "-o", *map(str, files), "--debug"])
    text, page = (file.read_text() for file in files)
    low, high = found["final"]["intervals"]["forget/probability"]
    head = text[text.index("95 % intervals") :].splitlines()[2]
    cells = next(line for line in text[text.index(head) :].splitlines() if "| unlearned |" in line).split(" | ")
    shown = cells[[name.strip("| ") for name in head.split(" | ")].index("forget prob.")]
    assert [float(bound) for bound in shown.strip("[]").split(", ")] == pytest.approx([low, high], rel=0.1)
    assert shown in page
    assert "Which metric to trust" in text
    assert 'id="depth"' in page
    assert "retrained anew, n = 10" in page


def test_python_of_the_page(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The block that prints what forget quality can tell at other numbers of rows."""
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "chance" in code)
    exec(block.replace("runs/demo", str(run)).replace("(10, 20, 40, 400)", "(10,)"), {})
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("10 0.5 {'n': 10, 'retrained': {")
