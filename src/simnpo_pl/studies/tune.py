"""Tune methods with Optuna: the same number of trials for each, chosen by the rule that the file states.

    python -m simnpo_pl tune configs/tune/tofu_forget05.yaml -o results/tune_forget05.md

Files after the first change it. Several workers may share the folder; after an interrupt the same command resumes. All
other options are options of every run, after those of the file.
"""

from argparse import Namespace
from dataclasses import replace
from typing import Any

from simnpo_pl.report.words import number
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json, write_text

try:
    from simnpo_pl.studies.tune_search import Search, Tuning, read_tuning, show
except ModuleNotFoundError as error:
    raise UserError(f"tuning needs {error.name}: pip install 'simnpo_pl[tune]'") from error
SHOWN = {"forget/probability": "forget prob.", "model_utility": "model utility", "retain/probability": "retain prob."}
"""Metrics in the table of trials, besides the one that is maximised."""


def run(options: Namespace) -> None:
    tuning = read_tuning(options.files)
    if options.folder is not None:
        tuning = replace(tuning, folder=options.folder)
    methods = options.methods or list(tuning.methods)
    for method in methods:
        if method not in tuning.methods:
            raise UserError(f"--methods {method}: no such method; the tuning has {', '.join(tuning.methods)}")
    searches = {method: Search(tuning, method, options.fit) for method in tuning.methods}
    if not options.table:
        for method in methods:
            searches[method].work()
    found = {method: search.results() for method, search in searches.items()}
    text = table(tuning, found)
    print(text)
    about = {"title": tuning.title, "rule": tuning.rule, "trials": tuning.trials, "seed": tuning.seed}
    write_json(tuning.path / "trials.json", {**about, "methods": found})
    for file in (tuning.path / "trials.md", options.out):
        if file is not None:
            write_text(file, text)
            print(f"written: {file}")


def table(tuning: Tuning, found: dict[str, dict[str, Any]]) -> str:
    """Rule, budget, search spaces, what was chosen, and every trial.

    Args:
        tuning: What was tuned.
        found: Method to `Search.results`.
    """
    columns = {name: title for name, title in SHOWN.items() if name != tuning.maximise}
    heads = ["settings", tuning.maximise, *columns.values(), "seconds"]
    lines = [f"# {tuning.title}", "", f"* Rule: {tuning.rule}."]
    lines.append(f"* Budget: {tuning.trials} trials of every method; failed ones count. Seed {tuning.seed}.")
    chosen, parts = [], []
    for name, method in found.items():
        space = "; ".join(f"`{option}` {show(values)}" for option, values in method["space"].items())
        lines.append(f"* Search space of {name}: {space}.")
        rows, best = [], []
        for trial in method["trials"]:
            state = "not finished" if trial["state"] == "running" else "failed"
            if trial["state"] == "complete":
                state = "finished" if trial["meets"] else "beyond the conditions"
            metrics = [number(trial["metrics"].get(metric)) for metric in (tuning.maximise, *columns)]
            cells = [show(trial["options"]), *metrics, "-" if trial["seconds"] is None else f"{trial['seconds']:.0f}"]
            if trial["trial"] == method["chosen"]:
                state, best = "**chosen**", cells
            rows.append([str(trial["trial"]), state, *cells])
        done = sum(trial["state"] != "running" for trial in method["trials"])
        nothing = ["none meets the conditions" if done else "none is finished", *["-"] * (len(heads) - 1)]
        chosen.append([name, f"{done} of {tuning.trials}", *(best or nothing)])
        parts += ["", f"## {name}", "", markdown.table(["trial", "state", *heads], rows)]
    lines += ["", "## Chosen", "", markdown.table(["method", "trials", *heads], chosen), *parts]
    return "\n".join(lines) + "\n"
