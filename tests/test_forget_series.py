"""Scalability and sustainability of MUSE: sweeps over forget sets, and over runs that start from earlier ones."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from simnpo_pl.__main__ import main
from simnpo_pl.studies import launch
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

    monkeypatch.setattr(launch, "start", start)
    return made


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def quick(muse_options: list[str]) -> list[str]:
    return [*muse_options, "--trainer.max_epochs", "1", "--export.best", "null"]


def write(folder: Path, fit: list[str], *methods: str) -> str:
    sweep = {"title": "Series", "folder": str(folder / "runs"), "table": "muse", "fit": shlex.join(fit)}
    file = folder / "series.yaml"
    file.write_text(yaml.safe_dump({**sweep, "methods": {str(n): m for n, m in enumerate(methods, start=1)}}))
    return str(file)


def test_successive_requests(
    calls: list[list[str]], quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each run starts from the model before it; a second call finds everything done."""
    first, second = (f"--data.forget_split {split}" for split in SPLITS)
    second += " --model.name {folder}/all/1/seed-{seed}/model --eval.start false"
    sweep = ["sweep", write(tmp_path, quick, first, second), "--debug"]
    figure = tmp_path / "figures" / "series.png"
    main([*sweep, "--figure", str(figure)])
    runs = [tmp_path / "runs" / "all" / name / "seed-0" for name in ("1", "2")]
    one, two = map(results, runs)
    assert [r["settings"]["data"]["init_args"]["forget_split"] for r in (one, two)] == SPLITS
    assert two["settings"]["model"]["name"] == str(runs[0] / "model")
    assert "start" in one
    assert "start" not in two
    shown = capsys.readouterr().out.partition("# Series")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["method", "Original", "1", "2"]
    assert rows[0][1:3] == ["VerbMem forget", "KnowMem forget"]
    for row, metrics in zip(rows[1:], (one["start"], one["final"], two["final"]), strict=True):
        assert float(row[1]) == pytest.approx(metrics["metrics"]["verbmem_forget"], rel=1e-2)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert f"figure: {figure}" in shown
    weights = [AutoModelForCausalLM.from_pretrained(run / "model").lm_head.weight for run in runs]
    assert not weights[0].equal(weights[1])

    calls.clear()
    main(sweep)
    assert calls == []
    with pytest.raises(UserError, match="seed-0 holds a run that was started with other options"):
        main(["sweep", write(tmp_path, quick, second.replace("/1/", "/2/")), "--debug"])


def test_growing_sets(calls: list[list[str]], quick: list[str], tmp_path: Path):
    """All runs start from the same model; larger shares of the forget text have more rows."""
    shares = ["raw/forget[:25%]", "raw/forget[:50%]", "raw/forget"]
    methods = [f"--data.forget_split {share}" for share in shares]
    main(["sweep", write(tmp_path, [*quick, *UNMEASURED], *methods), "--debug"])
    runs = [tmp_path / "runs" / "all" / name / "seed-0" for name in ("1", "2", "3")]
    assert [results(run)["settings"]["data"]["init_args"]["forget_split"] for run in runs] == shares
    assert len({results(run)["settings"]["model"]["name"] for run in runs}) == 1
    rows = [len((run / "weights.jsonl").read_text().splitlines()) for run in runs]
    assert rows == sorted(rows)
    assert rows[0] < rows[2]


def test_unfinished_runs_are_resumed(calls: list[list[str]], quick: list[str], tmp_path: Path):
    """With a checkpoint from there, without one from the beginning."""
    methods = [f"--data.forget_split {split}" for split in SPLITS]
    sweep = ["sweep", write(tmp_path, [*quick, *UNMEASURED], *methods), "--debug"]
    main(sweep)
    runs = [tmp_path / "runs" / "all" / name / "seed-0" for name in ("1", "2")]
    for run in runs:
        (run / "results.json").write_text(json.dumps({**results(run), "finished": False}))
    (runs[1] / "last.ckpt").unlink()
    calls.clear()
    main(sweep)
    assert len(calls) == 2
    assert all(results(run)["finished"] for run in runs)


def test_figures_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simnpo_pl.report.drawing.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"figures need matplotlib: pip install 'simnpo_pl\[report\]'"):
        main(["sweep", write(tmp_path, [], ""), "--figure", "x.png", "--debug"])


def test_unknown_options_of_other_commands(tmp_path: Path):
    with pytest.raises(UserError, match=r"unrecognized arguments: --no_such 1; --help lists the options"):
        main(["lm-eval", str(tmp_path), "--tasks", "x", "--no_such", "1", "--debug"])
