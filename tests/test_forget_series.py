"""Scalability and sustainability: a run a forget set, what is skipped, what is written."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from simnpo_pl.__main__ import main
from simnpo_pl.studies import launch as fit_once
from simnpo_pl.utils.errors import UserError

SPLITS = ["raw/forget[:50%]", "raw/forget[50%:]"]
UNMEASURED = ["--eval.start", "false", "--eval.final", "false", "--trainer.limit_val_batches", "0"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs are made in this process, since starting one takes longer than they do."""
    made: list[list[str]] = []

    def start(command: list[str], log: Path | None) -> int:
        assert command[1:4] == ["-m", "simnpo_pl", "fit"]
        made.append(command[4:])
        main([*command[3:], "--debug"])
        return 0

    monkeypatch.setattr(fit_once, "start", start)
    return made


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def quick(muse_options: list[str]) -> list[str]:
    return [*muse_options, "--trainer.max_epochs", "1", "--export.best", "null"]


def test_successive_requests(
    calls: list[list[str]], quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each run starts from the model before it; a second call finds everything done."""
    out = tmp_path / "sust"
    main(["sustainability", "--out", str(out), "--forget", *SPLITS, *quick, "--debug"])
    first, second = results(out / "1"), results(out / "2")
    assert [r["settings"]["data"]["init_args"]["forget_split"] for r in (first, second)] == SPLITS
    assert second["settings"]["model"]["name"] == str(out / "1" / "model")
    assert "start" in first
    assert "start" not in second
    table = json.loads((out / "table.json").read_text())
    assert [(r["run"], r["forget_split"]) for r in table["runs"]] == [("0", "-"), ("1", SPLITS[0]), ("2", SPLITS[1])]
    assert [r["metrics"] for r in table["runs"]] == [
        r["metrics"] for r in (first["start"], first["final"], second["final"])
    ]
    assert "| 2 | raw/forget[50%:] |" in (out / "table.md").read_text()
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "| VerbMem forget | KnowMem forget | KnowMem retain |" in capsys.readouterr().out
    weights = [AutoModelForCausalLM.from_pretrained(out / n / "model").lm_head.weight for n in ("1", "2")]
    assert not weights[0].equal(weights[1])

    calls.clear()
    main(["sustainability", "--out", str(out), "--forget", *SPLITS, *quick, "--debug"])
    assert calls == []
    with pytest.raises(UserError, match="1 holds a run that was started with other options"):
        main(["scalability", "--out", str(out), "--forget", "raw/forget", *quick, "--debug"])


def test_growing_sets(calls: list[list[str]], quick: list[str], tmp_path: Path):
    """All runs start from the same model; four shares of the forget text are the default."""
    out = tmp_path / "scal"
    main(["scalability", "--out", str(out), *quick, *UNMEASURED, "--debug"])
    splits = [results(out / str(n))["settings"]["data"]["init_args"]["forget_split"] for n in (1, 2, 3, 4)]
    assert splits == ["raw/forget[:25%]", "raw/forget[:50%]", "raw/forget[:75%]", "raw/forget"]
    assert len({results(out / str(n))["settings"]["model"]["name"] for n in (1, 2, 3, 4)}) == 1
    rows = [len((out / str(n) / "weights.jsonl").read_text().splitlines()) for n in (1, 2, 3, 4)]
    assert rows == sorted(rows)
    assert rows[0] < rows[3]


def test_unfinished_runs_go_on(calls: list[list[str]], quick: list[str], tmp_path: Path):
    """With a checkpoint from there, without one from the beginning."""
    out = tmp_path / "scal"
    forget = ["--forget", *SPLITS]
    main(["scalability", "--out", str(out), *forget, *quick, *UNMEASURED, "--debug"])
    for name in ("1", "2"):
        file = out / name / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "finished": False}))
    (out / "2" / "last.ckpt").unlink()
    calls.clear()
    main(["scalability", "--out", str(out), *forget, *quick, *UNMEASURED, "--debug"])
    assert len(calls) == 2
    assert all(results(out / name)["finished"] for name in ("1", "2"))


@pytest.mark.parametrize("option", ["--run_dir=x", "--data.forget_split", "--ckpt_path"])
def test_options_of_its_own(option: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"{option.split('=')[0]} is given by this command to each of its runs"):
        main(["scalability", "--out", str(tmp_path), "--config", "x", option, "y", "--debug"])


def test_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit_once, "start", lambda command, log: 2)
    with pytest.raises(UserError, match=r"fit in .*1 ended with exit code 2: see above"):
        main(["sustainability", "--out", str(tmp_path), "--model.name", "x", "--debug"])


def test_figures_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simnpo_pl.report.drawing.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"figures need matplotlib: pip install 'simnpo_pl\[report\]'"):
        main(["scalability", "--out", str(tmp_path), "--debug"])


def test_unknown_options_of_other_commands(tmp_path: Path):
    with pytest.raises(UserError, match=r"unrecognized arguments: --no_such 1; --help lists the options"):
        main(["lm-eval", str(tmp_path), "--tasks", "x", "--no_such", "1", "--debug"])
