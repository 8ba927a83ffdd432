"""AltPO's alternatives: sampled once and kept with the run, or from a file; a row comes once for each of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers import history, killed_in_epoch, results, same_weights
from simnpo_pl.__main__ import main
from simnpo_pl.benchmarks.answers import ALTERNATES, REQUEST, read_alternates, sample_alternates
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.data.training import TrainingRows
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.loading import load_tokenizer
from simnpo_pl.utils.errors import UserError

ROWS = [{"question": "Who?", "answer": "Ann Lee."}, {"question": "Where?", "answer": "In Oslo."}]


@pytest.fixture(scope="module")
def options(run_options: list[str]) -> list[str]:
    """A run without evaluations of its models."""
    skipped = [word for name in ("start", "final") for word in (f"--eval.{name}", "false")]
    return ["fit", *run_options, *skipped, "--model.objective", "AltPO"]


def test_sampled_once_and_kept(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A resumed run reads its own file, and so does another run that names it."""
    run = [*options, "--data.alternates", "2", "--debug"]
    main([*run, "--run_dir", str(tmp_path / "whole")])
    assert "forget rows, 40 retain rows" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "whole" / ALTERNATES).read_text().splitlines()]
    assert len(rows) == 10
    assert all(1 <= len(row["alternates"]) <= 2 for row in rows)
    pairs = sum(len(row["alternates"]) for row in rows)
    assert len(history(tmp_path / "whole")) == 2 * -(-pairs // 4)
    cut = [*run, "--run_dir", str(tmp_path / "cut")]
    with killed_in_epoch(2):
        main(cut)
    assert (tmp_path / "cut" / ALTERNATES).read_text() == (tmp_path / "whole" / ALTERNATES).read_text()
    main([*cut, "--ckpt_path", "last"])
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    given = str(tmp_path / "whole" / ALTERNATES)
    main([*options, "--data.alternates", given, "--run_dir", str(tmp_path / "given"), "--debug"])
    assert same_weights(tmp_path / "whole", tmp_path / "given")
    assert not (tmp_path / "given" / ALTERNATES).exists()
    assert results(tmp_path / "given")["finished"]


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> PromptTemplate:
    return PromptTemplate(load_tokenizer(str(model_folder)))


def test_what_is_kept_of_the_answers(encoder: PromptTemplate):
    """No blank answer, no repeated one, not the forget answer itself; the start model is asked for other facts."""
    drawn = ["Bo.", "Bo.", "", "In Oslo.", "In Rome.", "In Rome."]
    asked: list[str] = []

    def answer(data: Any) -> EvalResult:
        split = data.evaluation().splits[0]
        asked.extend(row["question"] for row in split.texts)
        assert data.evaluation().temperature == 1.0
        texts = drawn + [""] * (len(split.texts) - len(drawn))
        return EvalResult({}, {}, {}, [{"generation": text} for text in texts])

    made = sample_alternates(ROWS, 3, encoder, EvalOptions(), 0, answer)
    assert [row["alternates"] for row in made] == [["Bo."], ["In Rome."]]
    assert asked == [REQUEST.format(**row) for row in ROWS for _ in range(3)]
    with pytest.raises(UserError, match=r"no usable alternative to the answers of 1 of 3 forget rows, of 2"):
        sample_alternates([*ROWS, {"question": "When?", "answer": "Now."}], 2, encoder, EvalOptions(), 0, answer)
    with pytest.raises(UserError, match="reads other answers to questions, but the forget rows are plain text"):
        sample_alternates(Texts(["A text."], "documents"), 2, encoder, EvalOptions(), 0, answer)


def test_a_row_comes_once_for_each_alternative(encoder: PromptTemplate):
    rows = TrainingRows(ROWS, sampled=[["Bo.", "Cy."], ["In Rome."]])
    encoded = rows.encode(encoder, ("forget", "sampled"), 0)
    forget = encoder.encode_rows([(row["question"], row["answer"]) for row in ROWS], "forget")
    assert encoded["forget"] == [replace(forget[row], row=row) for row in (0, 0, 1)]
    assert encoded["sampled"] == encoder.encode_rows([("Who?", "Bo."), ("Who?", "Cy."), ("Where?", "In Rome.")], "x")
    assert rows.only([1]).encode(encoder, ("forget", "sampled"), 0)["forget"] == [replace(forget[1], row=0)]
    with pytest.raises(UserError, match="needs other answers to the forget questions, got none: `fit` asks the start"):
        TrainingRows(ROWS).encode(encoder, ("forget", "sampled"), 0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"question": "Who?", "alternates": ["Bo."]}], r"expected a line for each of 2 forget rows, got 1"),
        (
            [{"question": q, "alternates": ["Bo."]} for q in ("Who?", "Why?")],
            r"line 2: expected the question 'Where\?'",
        ),
        ([{"question": q, "alternates": []} for q in ("Who?", "Where?")], r"line 1: expected a list of texts as alt"),
    ],
)
def test_file_that_does_not_fit(lines: list[dict[str, Any]], message: str, tmp_path: Path):
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        read_alternates(str(file), ROWS)


def test_number_of_alternatives(options: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([*options, "--data.alternates", "0"])
    assert stop.value.code == 2
    assert "--data.alternates must be a file or a number of at least 1, got 0" in capsys.readouterr().err


def test_jensun_runs(options: list[str], tmp_path: Path):
    """It comes closer to the refusals' tokens and keeps to the reference."""
    run = [*options, "--model.objective", "JensUn", "--model.retain_loss", "JSD", "--run_dir", str(tmp_path / "run")]
    main([*run, "--debug"])
    steps = history(tmp_path / "run")
    assert steps[-1]["forget_loss"] < steps[0]["forget_loss"]
    assert steps[0]["retain_loss"] == pytest.approx(0, abs=1e-6)
