"""Checkpoints with published values: each is evaluated, and every value is within its tolerance or said not to be."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from simnpo_pl.__main__ import main
from simnpo_pl.studies.plans import read_plan
from simnpo_pl.studies.verify import Verification

SHIPPED = Path(__file__).parents[1] / "configs" / "verify" / "tofu_1b_forget10.yaml"
PARAPHRASE = (
    "--eval.metrics '[{class_path: simnpo_pl.metrics.answers.AnswerProbability, split: forget, "
    "name: paraphrase_probability, init_args: {kind: 1}}]'"
)


def write(file: Path, options: list[str], **changed: Any) -> Path:
    content = {
        "title": "Two tiny models",
        "source": "an evaluation here",
        "needs": "nothing",
        "folder": str(file.parent / "verify"),
        "fit": [shlex.join(options), "--eval.truth_ratio prob_mean --eval.generate_rows 2", PARAPHRASE],
        "tolerance": 1e-4,
        "checkpoints": {},
        **changed,
    }
    file.write_text(yaml.safe_dump(content))
    return file


def refused(file: Path, *words: str) -> Callable[[pytest.CaptureFixture[str]], str]:
    def read(capsys: pytest.CaptureFixture[str]) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["verify", str(file), *words])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip()

    return read


def test_tiny_checkpoints(
    run_options: list[str],
    model_folder: Path,
    other_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """The values of an evaluation agree with a second one; a changed value and one that is not measured do not."""
    file = write(tmp_path / "verify.yaml", run_options)
    plain = ["--eval.truth_ratio", "prob_mean", "--eval.generate_rows", "2", *shlex.split(PARAPHRASE)]
    published = {}
    for name, model in (("one", model_folder), ("two", other_folder)):
        main(["test", *run_options, *plain, "--model.name", str(model), "--run_dir", str(tmp_path / name)])
        found = json.loads((tmp_path / name / "results.json").read_text())["final"]["metrics"]
        names = ("forget/paraphrase_probability", "forget/truth_ratio", "retain/rouge", "model_utility")
        published[name] = {"model": str(model), "values": {metric: found[metric] for metric in names}}
    assert published["one"]["values"] != published["two"]["values"]
    write(file, run_options, checkpoints=published)
    main(["verify", str(file), "-o", str(tmp_path / "table.md")])
    table = (tmp_path / "table.md").read_text()
    assert "8 of 8 values are within their tolerance." in table
    assert table.count("| yes |") == 8

    probability = published["two"]["values"]["forget/paraphrase_probability"]
    published["two"]["values"] |= {"forget/paraphrase_probability": probability + 0.01, "privleak": 3.0}
    write(file, run_options, checkpoints=published)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(file), "--checkpoints", "two", "--table"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "3 of 5 values are within their tolerance." in out
    assert "| two | privleak | not measured | 3 | - | 1.0e-04 | no |" in out
    assert "| -0.0100 |" in out
    # A wider tolerance of one metric.
    write(file, run_options, checkpoints=published, tolerances={"forget/paraphrase_probability": 0.01})
    with pytest.raises(SystemExit):
        main(["verify", str(file), "--checkpoints", "two", "--table"])
    assert "4 of 5 values are within their tolerance." in capsys.readouterr().out
    assert "started with other options" in refused(file, "--table", "--eval.min_k", "0.2")(capsys)


def test_shipped_values():
    """Every figure of a checkpoint is one of a known metric; the models are those of the sources' names."""
    plan = read_plan([SHIPPED], Verification)
    assert len(plan.checkpoints) == 10
    assert {tuple(one.values) for one in plan.checkpoints.values()} == {tuple(plan.checkpoints["start"].values)}
    assert all(one.model.startswith("open-unlearning/") for one in plan.checkpoints.values())
    assert plan.checkpoints["retrained"].values["forget/extraction_strength"] == 0.059


def test_mistakes(run_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = {"model": "x", "values": {"model_utility": 0.5}}
    file = write(tmp_path / "verify.yaml", run_options, checkpoints={"one": one})
    message = refused(file, "--checkpoints", "two")(capsys)
    assert message == f"error: --checkpoints two: {file} has one"
    empty = write(tmp_path / "empty.yaml", run_options)
    assert "the file has no published values: name at least one checkpoint with values" in refused(empty)(capsys)
    wrong = write(tmp_path / "wrong.yaml", run_options, checkpoints={"one": one}, tolerances={"privleak": 1})
    assert "tolerances of privleak, of which no checkpoint has a published value" in refused(wrong)(capsys)
