"""Tuning: the rule, the equal budget, workers that share a study, and what becomes of interrupted trials."""

import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.distributions import FloatDistribution

from simnpo_pl.__main__ import main
from simnpo_pl.studies import launch
from simnpo_pl.studies.plans import read_plan
from simnpo_pl.studies.tune import NotANumber, Search, Tuning, distribution, measured, parsed, show, table, violation
from simnpo_pl.utils.errors import UserError

ROOT = Path(__file__).parents[1]
FILES = [[f] for f in sorted((ROOT / "configs" / "tune").glob("tofu*.yaml"))]
FILES += [[*files, ROOT / "configs" / "tune" / "tiny.yaml"] for files in FILES]
PLAN: dict[str, Any] = {
    "title": "A tuning",
    "folder": "somewhere",
    "trials": 4,
    "maximize": "forget_quality",
    "subject_to": ["model_utility >= 0.5 x start", "forget/rouge <= 0.75"],
    "methods": {
        "A": {"options": "--model.objective SimNPO", "space": {"beta": {"low": 1.0, "high": 3.0}}},
        "B": {"options": "", "space": {"steps": {"low": 1, "high": 9}, "kind": {"choices": ["x", "y"]}}},
    },
}


def write(into: Path, **changed: Any) -> Path:
    file = into / "tune.yaml"
    file.write_text(yaml.safe_dump({**PLAN, **changed}, sort_keys=False))
    return file


@pytest.fixture
def tuning(tmp_path: Path) -> Tuning:
    return read_plan([write(tmp_path, folder=str(tmp_path / "runs"))], Tuning)


def value_of(command: Sequence[str], option: str, default: str) -> str:
    return command[command.index(option) + 1] if option in command else default


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Sequence[str]]]:
    """Stands in for `fit`: forget quality 1 / (1 + (beta - 2)^2), utility that falls with beta."""

    def install(
        code: int = 0, quality: Callable[[float], float | None] | None = None, probability: float = 0.5
    ) -> list[Sequence[str]]:
        calls: list[Sequence[str]] = []

        def start(command: Sequence[str], log: Path | None = None) -> int:
            calls.append(command[4:])
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text("error: out of luck\n")
            beta = float(value_of(command, "--beta", "1"))
            found = 1 / (1 + (beta - 2) ** 2) if quality is None else quality(beta)
            metrics = {"forget_quality": found, "model_utility": 1.4 - 0.3 * beta, "forget/rouge": 0.5}
            metrics |= {"forget/probability": probability}
            folder = Path(value_of(command, "--run_dir", ""))
            threading.Event().wait(0.01)
            (folder / "model").mkdir(parents=True, exist_ok=True)
            (folder / "last.ckpt").write_text("")
            (folder / "config.yaml").write_text(f"model: {{beta: {beta}}}\n")
            record = {
                "finished": code == 0,
                "final": {"metrics": metrics},
                "start": {"metrics": {"model_utility": 1.2, "forget/probability": 1.0}},
            }
            (folder / "results.json").write_text(json.dumps({**record, "seconds": {"total": 3.0}}))
            return code

        monkeypatch.setattr(launch, "start", start)
        return calls

    return install


# -- the rule --------------------------------------------------------------------------------------------


def test_conditions_by_hand(tuning: Tuning):
    """0.5 x 1.2 = 0.6 is the least utility: 0.1 short of it is a violation of 0.1, 0.2 above one of -0.2."""
    at_least, at_most = tuning.subject_to
    assert parsed(at_least) == ("model_utility", ">=", 0.5, "start")
    assert parsed(at_most) == ("forget/rouge", "<=", 0.75, None)

    def record(utility: float, rouge: float) -> dict[str, Any]:
        final = {"metrics": {"model_utility": utility, "forget/rouge": rouge}}
        return {"final": final, "start": {"metrics": {"model_utility": 1.2}}}

    assert violation(at_least, record(0.5, 0)) == pytest.approx(0.1)
    assert violation(at_least, record(0.8, 0)) == pytest.approx(-0.2)
    assert violation(at_most, record(0, 1.0)) == pytest.approx(0.25)
    assert tuning.rule == (
        "the largest forget_quality of the exported model among trials with model_utility >= 0.5 x start and "
        "forget/rouge <= 0.75"
    )


def test_measured():
    record = {"final": {"metrics": {"a": None, "b": 2}}, "unavailable": {"c": "no retrained model"}}
    assert measured(record, "final", "b") == 2
    with pytest.raises(NotANumber, match="a of the final model is not a number"):
        measured(record, "final", "a")
    with pytest.raises(UserError, match="the rule needs c of the final model, which was not measured: no retrained"):
        measured(record, "final", "c")
    with pytest.raises(UserError, match="the rule needs b of the start model, which was not measured: measured are"):
        measured(record, "start", "b")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"maximize": "privleak"}, "the rule must not use privleak: membership inference is what"),
        ({"maximize": "forget/mia_min_k"}, "the rule must not use forget/mia_min_k"),
        ({"subject_to": ["mia_loss <= 0.6"]}, "the rule must not use mia_loss"),
        ({"subject_to": ["utility > 1"]}, r"subject_to 'utility > 1': expected METRIC >= NUMBER"),
        ({"subject_to": ["utility >= much"]}, r"subject_to 'utility >= much': expected METRIC >= NUMBER"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"methods": {"A": {"options": "", "space": {}}}}, "A has no search space: name an option to tune"),
        ({"methods": {"A": {"options": "", "space": {"b": {"low": 2, "high": 1}}}}}, "search space of b: "),
        (
            {"methods": {"A": {"options": "", "space": {"b": {"low": 0, "high": 1, "log": True}}}}},
            "search space of b: ",
        ),
        ({"methods": {"A": {"options": "", "space": {"b": {"low": 0, "choices": [1]}}}}}, "search space of b: "),
        ({"trails": 3}, "trails"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["tune", str(write(tmp_path, **changed)), "--folder", str(tmp_path / "runs")])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_a_rule_that_reads_what_no_run_measures(
    run_options: list[str], program: Callable[..., list[Sequence[str]]], tmp_path: Path, capsys: Any
):
    """It is refused before the first run; what a retrained model has, only that run can tell."""
    methods = {"A": {"options": run_options, "space": {"model.lr": {"low": 1e-5, "high": 1e-4}}}}
    calls, folder = program(), tmp_path / "runs"
    for metric, condition, options, said in (
        ("forget_quality", [], [], "forget_quality of the final model, which was not measured: no retrained model to"),
        ("forget/rogue", [], [], "forget/rogue of the final model, which was not measured: measured are forget/"),
        ("forget/rouge", [], ["--eval.generate_rows", "0"], "forget/rouge of the final model, which was not measured"),
        ("model_utility", [], ["--eval.final", "false"], "model_utility of the final model, which was not measured"),
        (
            "model_utility",
            ["forget/nll <= 2 x start"],
            ["--eval.start", "false"],
            "forget/nll of the start model, which",
        ),
        ("model_utility", ["forget/rouge <= 2 x retrained"], [], "forget/rouge of the retrained model, which was not"),
    ):
        file = write(tmp_path, methods=methods, trials=1, maximize=metric, subject_to=condition)
        with pytest.raises(SystemExit) as stop:
            main(["tune", str(file), "--folder", str(folder), *options])
        assert stop.value.code == 2
        assert f"error: the rule needs {said}" in capsys.readouterr().err
        assert not folder.exists()
    assert not calls
    with pytest.raises(UserError, match="the rule needs forget/rouge of the retrained model"):
        main(["tune", str(file), "--folder", str(folder), "--eval.retrained", "gone", "--debug"])
    assert len(calls) == 1


# -- the search ------------------------------------------------------------------------------------------


def test_every_method_has_the_same_budget(
    program: Callable[..., list[Sequence[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Four trials each, in their ranges; chosen is what the rule says of those that were made."""
    calls = program()
    file, folder, out = write(tmp_path), tmp_path / "runs", tmp_path / "results" / "tune.md"
    main(["tune", str(file), "--folder", str(folder), "-o", str(out), "--model.lr", "1e-3", "--debug"])
    assert len(calls) == 8
    assert all(call[call.index("--model.lr") :][:2] == ["--model.lr", "1e-3"] for call in calls)
    found = json.loads((folder / "trials.json").read_text())
    assert found["rule"].startswith("the largest forget_quality")
    for name in ("A", "B"):
        assert len(found["methods"][name]["trials"]) == 4
    betas = [trial["options"]["beta"] for trial in found["methods"]["A"]["trials"]]
    assert len(set(betas)) == 4
    assert all(1 <= beta <= 3 for beta in betas)
    # Utility 1.4 - 0.3 beta is at least 0.6 up to beta 8/3.
    able = [i for i, beta in enumerate(betas) if beta <= 8 / 3]
    assert [trial["meets"] for trial in found["methods"]["A"]["trials"]] == [beta <= 8 / 3 for beta in betas]
    assert found["methods"]["A"]["chosen"] == min(able, key=lambda i: abs(betas[i] - 2))
    for trial in found["methods"]["B"]["trials"]:
        assert isinstance(trial["options"]["steps"], int)
        assert trial["options"]["kind"] in ("x", "y")
    shown = out.read_text()
    assert "* Budget: 4 trials of every method; failed ones count. Seed 0." in shown
    assert "* Search space of B: `steps` low 1, high 9; `kind` choices ['x', 'y']." in shown
    assert shown.count("**chosen**") == 2
    said = capsys.readouterr().out
    assert shown in said
    assert "forgot anything" not in shown
    for name in ("A", "B"):
        number = found["methods"][name]["chosen"]
        model, settings = folder / name / f"trial-{number:03d}" / "model", folder / f"chosen_{name}.yaml"
        assert f"{name}: trial {number} chosen; model: {model}, settings: {settings}\n" in said
    assert yaml.safe_load((folder / "chosen_A.yaml").read_text()) == {
        "model": {"beta": betas[found["methods"]["A"]["chosen"]]}
    }
    models = [f.parent.name for f in (folder / "A").glob("*/model")]
    assert models == [f"trial-{found['methods']['A']['chosen']:03d}"]
    assert [f.parent.name for f in (folder / "A").glob("*/last.ckpt")] == models
    main(["tune", str(file), "--folder", str(folder), "--model.lr", "1e-3", "--debug"])
    assert len(calls) == 8


def test_workers_share_the_budget(program: Callable[..., list[Sequence[str]]], tuning: Tuning):
    """Three at once: no trial twice, none beyond the budget, no value twice."""
    calls = program()
    searches = [Search(tuning, "A") for _ in range(3)]
    workers = [threading.Thread(target=search.work) for search in searches]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(Path(value_of(call, "--run_dir", "")).name for call in calls) == [f"trial-{i:03d}" for i in range(4)]
    assert len({value_of(call, "--beta", "") for call in calls}) == 4
    assert len(searches[0].study.get_trials()) == 4
    assert all(trial.state.is_finished() for trial in searches[0].trials)


def test_an_interrupted_trial_is_resumed(program: Callable[..., list[Sequence[str]]], tuning: Tuning):
    """It keeps its number and its values; the budget stays what it is."""
    first = program(code=143)
    with pytest.raises(SystemExit):
        Search(tuning, "A").work()
    assert "| 0 | not finished |" in table(tuning, {"A": Search(tuning, "A").results()})
    second = program()
    search = Search(tuning, "A")
    search.work()
    assert second[0] == first[0]
    assert len(second) == 4
    assert len(search.study.get_trials()) == 4


@pytest.mark.parametrize(("probability", "nothing"), [(0.91, True), (0.9, True), (0.89, False)])
def test_nothing_forgotten(
    program: Callable[..., list[Sequence[str]]], tmp_path: Path, tuning: Tuning, probability: float, nothing: bool
):
    """The start model's forget probability is 1: from 0.9 on the verdict is "not forgotten"."""
    program(probability=probability)
    search = Search(tuning, "A")
    search.work()
    said = "No trial of A forgot anything: search higher learning rates or forget weights."
    assert (said in table(tuning, {"A": search.results()})) == nothing


def test_failed_trials_count(program: Callable[..., list[Sequence[str]]], tuning: Tuning):
    calls = program(code=1)
    search = Search(tuning, "A")
    search.work()
    assert len(calls) == 4
    assert search.chosen is None
    shown = search.results()
    assert {trial["state"] for trial in shown["trials"]} == {"fail"}
    assert "out of luck" in shown["trials"][0]["error"]
    assert "| A | 4 of 4 | none meets the conditions |" in table(tuning, {"A": shown})


def test_a_broken_model_is_a_failed_trial(program: Callable[..., list[Sequence[str]]], tuning: Tuning):
    program(quality=lambda beta: None if beta < 2 else 0.5)
    search = Search(tuning, "A")
    search.work()
    for trial in search.trials:
        assert trial.user_attrs.get("error", "") == (
            "forget_quality of the final model is not a number" if trial.params["beta"] < 2 else ""
        )


def test_another_rule_needs_another_folder(program: Callable[..., list[Sequence[str]]], tmp_path: Path, tuning: Tuning):
    program()
    Search(tuning, "A").work()
    other = read_plan([write(tmp_path, folder=tuning.folder, subject_to=[])], Tuning)
    with pytest.raises(UserError, match="holds trials of A with another rule or search space"):
        Search(other, "A")
    for changed, more in (({"fit": "--model.lr 1"}, []), ({"seed": 1}, []), ({}, ["--model.lr", "1"])):
        other = read_plan([write(tmp_path, folder=tuning.folder, **changed)], Tuning)
        with pytest.raises(UserError, match="or with other options or configs"):
            Search(other, "A", more)


def test_values_as_options(tuning: Tuning):
    """What the search draws is what runs, as YAML; numbers that YAML reads as text are numbers."""
    values = {"retain_loss": None, "truncate": True, "lr": 1e-5, "kind": "x"}
    drawn = ["--retain_loss", "null", "--truncate", "true", "--lr", "1e-05", "--kind", "x", "--seed_everything", "0"]
    assert tuning.options("B", values, ["--config", "more.yaml"]) == ["--config", "more.yaml", *drawn]
    found = distribution("lr", {"low": "1e-5", "high": "1e-4", "log": True})
    assert found == FloatDistribution(1e-5, 1e-4, log=True)
    assert show({"loss.beta": 0.1, "retain.beta": 0.7, "model.lr": 1e-5}) == "loss.beta 0.1, retain.beta 0.7, lr 1e-05"


@pytest.mark.parametrize("option", ["--steps", "--beta=2", "--seed_everything"])
def test_what_the_search_draws_is_no_option(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["tune", str(write(tmp_path)), "--folder", str(tmp_path / "runs"), option, "3"])
    assert f"{option.partition('=')[0]}: the tuning file sets it for each trial" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_storage_by_url(program: Callable[..., list[Sequence[str]]], tmp_path: Path):
    calls = program()
    tuning = read_plan([write(tmp_path, folder=str(tmp_path / "runs"), storage="sqlite:///{folder}/tune.db")], Tuning)
    Search(tuning, "A").work()
    Search(tuning, "A").work()
    assert len(calls) == 4
    assert (tmp_path / "runs" / "tune.db").is_file()


def test_unknown_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["tune", str(write(tmp_path)), "--methods", "C"])
    assert "--methods C: no such method; the tuning has A, B" in capsys.readouterr().err


@pytest.mark.parametrize("files", FILES, ids=lambda f: "+".join(file.stem for file in f))
def test_shipped_files(files: list[Path], capsys: pytest.CaptureFixture[str]):
    """The first value of every range gives a command that `fit` understands."""
    tuning = read_plan(files, Tuning)
    for name, method in tuning.methods.items():
        values = {
            option: choice["choices"][0] if "choices" in choice else choice["low"]
            for option, choice in method.space.items()
        }
        with pytest.raises(SystemExit) as stop:
            main(["fit", *tuning.options(name, values, []), "--print_config"])
        assert stop.value.code == 0
        got = yaml.safe_load(capsys.readouterr().out)
        assert got["model"]["objective"]["class_path"].endswith(name)
        assert got["model"]["objective"]["init_args"]["beta"] == values["model.objective.beta"]
