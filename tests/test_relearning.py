"""The relearning attack on finished runs: which rows, what is measured, what is kept and not done again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simnpo_pl.__main__ import main
from simnpo_pl.report.robustness import spread
from simnpo_pl.studies.relearn import Attack, choose_rows

KEY = "share=0.3 epochs=2 lr=0.01"


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def run(run_options: list[str], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unlearned"
    options = ["--run_dir", str(folder), "--eval.retrained", str(other_folder), "--trainer.max_epochs", "1"]
    main(["fit", *run_options, *options, "--debug"])
    return folder


def relearn(run: Path, *options: str) -> None:
    main(["relearn", str(run), "--share", "0.3", "--epochs", "2", "--lr", "1e-2", *options, "--debug"])


def test_rows_by_hand():
    """0.4 of 5 rows are 2; of equally short answers the earlier rows are taken; a draw is its seed's."""
    lengths = [4, 3, 9, 3, 3]
    assert choose_rows(lengths, Attack("shortest", 0.4, 1, 1.0), seed=0) == [1, 3]
    assert choose_rows(lengths, Attack("shortest", 0.01, 1, 1.0), seed=0) == [1]
    draws = [choose_rows(range(100), Attack("random", 0.2, 1, 1.0), seed) for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    assert len(set(draws[0])) == 20
    assert choose_rows(lengths, Attack("random", 1.0, 1, 1.0), seed=3) == [0, 1, 2, 3, 4]


def test_spread_by_hand():
    """Mean 4, squared deviations 4 + 0 + 4 over n - 1 = 2."""
    assert spread([2.0, None, 4.0, 6.0]) == (4.0, 2.0, 3)
    assert spread([5.0]) == (5.0, 0.0, 1)
    assert spread([None]) is None


def test_curve(run: Path, run_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Starts at the unlearned model, and is what `fit` with plain fine-tuning on these rows gives."""
    relearn(run, "--subset", "shortest")
    entry = results(run)["relearn"][f"shortest {KEY}"]
    assert entry["settings"] == {"subset": "shortest", "share": 0.3, "epochs": 2, "lr": 0.01}
    (repeat,) = entry["repeats"]
    assert [epoch["epoch"] for epoch in repeat["epochs"]] == [0, 1, 2]
    before, *after = (epoch["metrics"] for epoch in repeat["epochs"])
    final = results(run)["final"]["metrics"]
    assert before == pytest.approx({name: final[name] for name in before}, rel=1e-5)
    assert {"forget_quality", "forget/probability", "forget/truth_ratio"} <= set(before)
    assert after[1]["forget/probability"] > before["forget/probability"]

    lines = capsys.readouterr().out.splitlines()
    assert f"{run.name}: relearning 3 shortest rows, draw 0" in lines
    row = next(line for line in lines if line.startswith(f"| {run.name} | SimNPO | 3 shortest rows | forget prob."))
    assert len(row.split("|")) == 4 + 3 + 2

    again = tmp_path / "again"
    options = ["--model.name", str(run / "model"), "--model.objective", "FineTune", "--model.retain_loss", "null"]
    options += ["--data.forget_rows", str(repeat["rows"]), "--model.warmup_epochs", "0", "--model.lr", "1e-2"]
    main(["fit", *run_options, *options, "--run_dir", str(again), "--debug"])
    for epoch, expected in zip(results(again)["epochs"], after, strict=True):
        for name in ("forget/probability", "forget/truth_ratio", "forget/exact_memorization"):
            assert expected[name] == pytest.approx(epoch["metrics"][name], rel=1e-5)


def test_what_is_there_is_not_done_again(run: Path, monkeypatch: pytest.MonkeyPatch):
    """One more draw is added to the two that are there; with all there nothing is opened."""
    from simnpo_pl.studies import relearn as module

    opened: list[Any] = []
    reopen: Callable[..., Any] = module.reopen
    monkeypatch.setattr(module, "reopen", lambda *a: (opened.append(a), reopen(*a))[1])
    relearn(run, "--subset", "random", "--repeats", "2")
    first = results(run)["relearn"][f"random {KEY}"]["repeats"]
    relearn(run, "--subset", "random", "--repeats", "3")
    second = results(run)["relearn"][f"random {KEY}"]["repeats"]
    assert second[:2] == first
    assert [repeat["seed"] for repeat in second] == [0, 1, 2]
    assert len({tuple(repeat["rows"]) for repeat in second}) > 1
    assert len(opened) == 3
    relearn(run, "--subset", "random", "--repeats", "3")
    assert len(opened) == 3
    assert results(run)["final"]["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--share", "0"), "--share: must be above 0 and at most 1, got 0"),
        (("--epochs", "0"), "--epochs: must be at least 1, got 0"),
        (("--repeats", "-1"), "--repeats: must be at least 1, got -1"),
        (("--lr", "nan"), "--lr: must be above 0, got nan"),
        (("--seed", "-1"), "--seed: must be at least 0, got -1"),
        (("--subset", "longest"), "invalid choice: 'longest'"),
        ((), "holds no results.json; give folders that fit or test wrote"),
    ],
)
def test_mistakes(options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["relearn", str(tmp_path), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_that_cannot_be_attacked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for finished, message in ((False, "holds an unfinished run; resume it: --run_dir"), (True, "holds no model/")):
        (tmp_path / "results.json").write_text(json.dumps({**results(run), "finished": finished}))
        with pytest.raises(SystemExit):
            main(["relearn", str(tmp_path)])
        assert message in capsys.readouterr().err
