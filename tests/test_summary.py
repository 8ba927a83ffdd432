"""What the terminal shows after a run: a table and the verdict, at any width."""

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from simnpo_pl.cli.summary import generates, measures, quiet, show, written
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.plan import Generation, Split
from simnpo_pl.metrics.base import RowMetric

LONG = "47 of 200 forget answers are still given word for word (start model 200, retrained model 0)"
RECORD: dict[str, Any] = {
    "epochs": [],
    "start": {"metrics": {"forget_quality": 3.9e-27, "forget/probability": 0.992, "retain/nll": 2.5}},
    "retrained": {"metrics": {"forget/probability": 0.0952, "retain/nll": 2.5}},
    "final": {"metrics": {"forget_quality": 0.12, "forget/probability": 0.714, "retain/nll": 2.6, "forget/own": 0.5}},
    "titles": {
        "forget/own": {"name": "forget/own", "short": "my own", "unit": "", "higher_is_better": None, "text": ""}
    },
    "verdict": {
        "category": "partly forgotten",
        "reasons": [LONG],
        "untested": ["relearning", "rounded weights"],
        "advice": ["raise --model.lr from 5e-05 to 0.0001"],
    },
}


def shown(record: dict[str, Any], width: int) -> list[str]:
    output = io.StringIO()
    show(record, Console(file=output, width=width, highlight=False, markup=False))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with warnings.catch_warnings():
        quiet()
    said = warnings.formatwarning("answers\nmay be poor", UserWarning, "generation.py", 145, "rank_zero_warn(")
    assert said == "warning: answers may be poor\n"


@pytest.mark.parametrize("width", [80, 120])
def test_table_and_verdict(width: int):
    lines = shown(RECORD, width)
    assert max(map(len, lines)) <= width
    cells = [line.split() for line in lines]
    assert ["metric", "start", "retrained", "unlearned"] in cells
    assert ["forget", "quality", "3.9e-27", "-", "0.12"] in cells
    assert ["forget", "prob.", "0.992", "0.0952", "0.714"] in cells
    assert ["retain", "loss", "(nats", "per", "token)", "2.5", "2.5", "2.6"] in cells
    assert ["my", "own", "-", "-", "0.5"] in cells
    after = lines[lines.index("verdict: partly forgotten") + 1 :]
    assert " ".join(" ".join(after).split()) == (
        f"{LONG} not tested: relearning; rounded weights next, one of: raise --model.lr from 5e-05 to 0.0001"
    )


class Known(RowMetric):
    title = "known answers"


def test_what_is_measured():
    """By titles, a custom metric's too; sampled answers are said where answers are generated."""
    split = Split("forget", [{"answer": "a"}], [], {"forget/share_known": Known(1)})
    evaluation = Evaluation([split], {}, {"forget_quality": "no retained rows"}, str)
    said = "measured on 1 forget rows: forget known answers"
    assert measures(evaluation) == f"{said}\nnot measured:\n  forget quality: no retained rows"
    evaluation.temperature = 0.7
    assert measures(evaluation).startswith(f"{said}\n")
    split.generation = Generation([[1]], 8)
    assert f"{said}; answers sampled at temperature 0.7\n" in measures(evaluation)
    assert generates(evaluation) == "answers are generated for 1 forget rows; answers sampled at temperature 0.7"


def test_commands_can_be_pasted():
    said = written(Path("my runs/one"))
    assert "-m simnpo_pl report 'my runs/one'\n" in said
    assert said.endswith("--logdir 'my runs'")


def test_a_fine_tuned_model_is_called_so(tmp_path: Path):
    lines = shown({**RECORD, "objective": {"name": "FineTune"}}, 80)
    assert ["metric", "start", "retrained", "fine-tuned"] in [line.split() for line in lines]
    (tmp_path / "model").mkdir()
    assert "  model           exported model, for AutoModel" in written(tmp_path)


def test_an_evaluation_has_no_verdict():
    one = {"epochs": [], "final": RECORD["final"]}
    lines = shown(one, 80)
    assert ["metric", "model"] in [line.split() for line in lines]
    assert not any("verdict" in line for line in lines)
    assert shown({"epochs": []}, 80) == ["nothing was evaluated"]
