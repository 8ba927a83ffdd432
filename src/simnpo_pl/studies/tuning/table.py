"""All trials of a tuning, with the rule that chose, as Markdown and as data."""

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from simnpo_pl.report.words import number
from simnpo_pl.studies.tuning.plan import Tuning
from simnpo_pl.studies.tuning.study import Search, describe
from simnpo_pl.utils import markdown

SHOWN = {"forget/probability": "forget prob.", "model_utility": "model utility", "retain/probability": "retain prob."}


def table(tuning: Tuning, searches: Sequence[Search]) -> str:
    """Rule, budget, search spaces, what was chosen, and every trial."""
    lines = [f"# {tuning.title}", ""]
    lines += [f"* Rule: {tuning.rule}."]
    lines += [f"* Budget: {tuning.trials} trials of every method; failed ones count. Seed {tuning.seed}."]
    for name, method in tuning.methods.items():
        space = "; ".join(f"`{option}` {choice}" for option, choice in method.space.items())
        lines.append(f"* Search space of {name}: {space}.")
    chosen = []
    for search in searches:
        best, done = search.best(), sum(trial.state.is_finished() for trial in search.trials)
        count = str(done) if done == tuning.trials else f"{done} of {tuning.trials}"
        if best is None:
            reason = "none meets the conditions" if done else "none is finished"
            chosen.append([search.method, count, reason, *["-"] * (len(_titles(tuning)) - 1)])
        else:
            chosen.append([search.method, count, *_cells(tuning, search, best)])
    lines += ["", "## Chosen", "", markdown.table(["method", "trials", *_titles(tuning)], chosen)]
    for search in searches:
        best = search.best()
        number_chosen = None if best is None else best.number
        trials = [
            [str(t.number), _state(search, t, t.number == number_chosen), *_cells(tuning, search, t)]
            for t in search.trials
        ]
        lines += ["", f"## {search.method}", "", markdown.table(["trial", "state", *_titles(tuning)], trials)]
    return "\n".join(lines) + "\n"


def data(tuning: Tuning, searches: Sequence[Search]) -> dict[str, Any]:
    """The same for programs."""
    methods = {}
    for search in searches:
        best = search.best()
        methods[search.method] = {
            "space": {name: str(choice) for name, choice in tuning.methods[search.method].space.items()},
            "chosen": None if best is None else best.number,
            "trials": [_entry(search, trial) for trial in search.trials],
        }
    return {
        "title": tuning.title,
        "rule": tuning.rule,
        "trials": tuning.trials,
        "seed": tuning.seed,
        "methods": methods,
    }


def _entry(search: Search, trial: FrozenTrial) -> dict[str, Any]:
    note: Mapping[str, Any] = search.note(trial) if trial.state.is_finished() else {}
    values = {"value": trial.value if trial.state == TrialState.COMPLETE else None, "meets": search.meets(trial)}
    return {"trial": trial.number, "state": trial.state.name.lower(), "options": trial.params, **values, **note}


def _state(search: Search, trial: FrozenTrial, chosen: bool) -> str:
    if trial.state == TrialState.COMPLETE:
        return "**chosen**" if chosen else "finished" if search.meets(trial) else "beyond the conditions"
    return "failed" if trial.state == TrialState.FAIL else "not finished"


def _titles(tuning: Tuning) -> list[str]:
    shown = [title for metric, title in SHOWN.items() if metric != tuning.maximise]
    return ["settings", tuning.maximise, *shown, "seconds"]


def _cells(tuning: Tuning, search: Search, trial: FrozenTrial) -> list[str]:
    if not trial.state.is_finished():
        return [describe(trial.params), *["-"] * (len(_titles(tuning)) - 1)]
    note = search.note(trial)
    shown = [metric for metric in SHOWN if metric != tuning.maximise]
    metrics = [note["metrics"].get(metric) for metric in (tuning.maximise, *shown)]
    seconds = "-" if note["seconds"] is None else f"{note['seconds']:.0f}"
    return [describe(trial.params), *map(number, metrics), seconds]
