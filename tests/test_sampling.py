"""An evaluation whose answers are sampled: `--eval.temperature`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.utils.errors import UserError

CLI = Callable[..., None]
FEW = ("--eval.generate_rows", "4", "--eval.max_new_tokens", "8")


def answers(cli: CLI, folder: Path, *options: str) -> dict[tuple[str, int], str]:
    cli("predict", *FEW, *options, "--run_dir", str(folder))
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {(row["split"], row["index"]): row["generation"] for row in rows if "generation" in row}


def test_an_answer_follows_from_seed_split_and_row(cli: CLI, tmp_path: Path):
    """Whatever is generated with it; another seed gives others, and close to 0 they are the greedy ones."""
    hot = ("--eval.temperature", "2")
    sampled = answers(cli, tmp_path / "one", *hot)
    assert sampled == answers(cli, tmp_path / "again", *hot, "--eval.prompts_per_batch", "3")
    retain = answers(cli, tmp_path / "retain", *hot, "--eval.splits", "[retain]")
    assert retain == {key: text for key, text in sampled.items() if key[0] == "retain"}
    assert sampled != answers(cli, tmp_path / "other", *hot, "--seed_everything", "1")
    greedy = answers(cli, tmp_path / "greedy")
    assert sampled != greedy
    assert answers(cli, tmp_path / "cold", "--eval.temperature", "1e-6") == greedy


def test_rouge_of_sampled_answers(cli: CLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = (*FEW, "--eval.temperature", "2", "--eval.splits", "[forget]")
    cli("test", *options, "--run_dir", str(tmp_path / "run"))
    assert "; answers sampled at temperature 2\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    found = [row["rougeL_recall"] for row in rows if "generation" in row]
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    assert content["final"]["metrics"]["forget/rouge"] == pytest.approx(sum(found) / 4)
    assert content["settings"]["eval"]["temperature"] == 2


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_no_such_temperature(value: float):
    with pytest.raises(UserError, match=r"--eval.temperature must be 0 \(greedy\) or above, got"):
        EvalOptions(temperature=value)
