"""Tune methods with Optuna: the same number of trials for each, chosen by the rule that the file states.

    python -m simnpo_pl tune configs/tune/tofu_forget05.yaml -o results/tune_forget05.md

Files after the first change it. Several workers may share the folder; after an interrupt the same command resumes. All
other options are options of every run, after those of the file. The folder keeps the model of the chosen trial, and its
settings as chosen_METHOD.yaml, a config for `fit`.
"""

# Not `Study.optimize`: it cannot resume an interrupted trial, and several workers may exceed the number of trials.
import json
import re
import shutil
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.runs.verdict import UNMOVED, Verdict
from simnpo_pl.studies.launch import Job, NotANumber, RunFailed, Taken, made_of, measured, read_record
from simnpo_pl.studies.plans import Plan, Words, read_plan, words_of, write_tables
from simnpo_pl.studies.reopen import to_measure
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json, write_text

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial, TrialState
except ModuleNotFoundError as error:
    raise UserError(f"tuning needs {error.name}: pip install 'simnpo_pl[tune]'") from error

optuna.logging.set_verbosity(optuna.logging.WARNING)
CONDITION = re.compile(r"(\S+) (>=|<=) ([\d.e+-]+)(?: x (start|retrained))?")
MEMBERSHIP = re.compile(r"(^|[/_])(mia|privleak|membership)")
SHOWN = ("forget/probability", "model_utility", "retain/probability")
"""Metrics in the table of trials, next to the one that is maximized."""


def parsed(condition: str) -> tuple[str, str, float, str | None]:
    """Metric, sign, bound and model of a condition such as `model_utility >= 0.95 x start`."""
    match = CONDITION.fullmatch(condition.strip())
    if match is None:
        raise UserError(
            f"subject_to {condition!r}: expected METRIC >= NUMBER or METRIC <= NUMBER, with x start or x retrained "
            "where the bound is a multiple of that model's value"
        )
    return match[1], match[2], float(match[3]), match[4]


def violation(condition: str, record: dict[str, Any]) -> float:
    """How far a run is beyond the bound; 0 or less if the condition holds."""
    metric, sign, bound, model = parsed(condition)
    bound *= measured(record, model, metric) if model else 1
    value = measured(record, "final", metric)
    return bound - value if sign == ">=" else value - bound


@dataclass(frozen=True)
class Method:
    """A method to tune.

    Args:
        options: Of `fit`, as on a command line.
        space: Option, without its dashes, to the values to try: `{low: L, high: H}`, with `log: true` on a logarithmic
            scale, or `{choices: [A, B]}`. Two whole numbers are tried as whole numbers.
    """

    options: Words
    space: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Tuning(Plan):
    """Content of a tuning file, such as `configs/tune/tofu_forget05.yaml`.

    The rule refuses membership-inference metrics, because they judge the tuned method.

    Args:
        methods: What is tuned.
        trials: Of every method, the same for all.
        maximize: Metric of the exported model that the rule maximizes.
        subject_to: Conditions that a trial must meet to be chosen: `METRIC >= NUMBER`, `METRIC <= NUMBER`, or with
            `x start` or `x retrained` that multiple of this model's value.
        seed: Of the search, and of every run.
        storage: URL of an Optuna storage that workers share, such as sqlite:///tune.db; null keeps a journal file in
            the folder.
    """

    EXAMPLE = "configs/tune/tofu_forget05.yaml"
    BY_NAME = ("methods",)

    methods: dict[str, Method]
    trials: int
    maximize: str
    subject_to: list[str] = field(default_factory=list)
    seed: int = 0
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("the tuning has no methods: name at least one")
        if self.trials < 1:
            raise UserError(f"trials must be at least 1, got {self.trials}")
        for name, method in self.methods.items():
            if not method.space:
                raise UserError(f"{name} has no search space: name an option to tune")
            for option, values in method.space.items():
                distribution(option, values)
        for metric in (self.maximize, *(parsed(condition)[0] for condition in self.subject_to)):
            if MEMBERSHIP.search(metric):
                raise UserError(
                    f"the rule must not use {metric}: membership inference is what a tuned method is judged by; "
                    "choose by another metric"
                )

    @property
    def rule(self) -> str:
        conditions = f" among trials with {' and '.join(self.subject_to)}" if self.subject_to else ""
        return f"the largest {self.maximize} of the exported model{conditions}"

    def options(self, method: str, values: dict[str, Any], more: Sequence[str]) -> list[str]:
        """Options of a trial's `fit`: those of the file, `more`, and the values that the search drew."""
        drawn = []
        for name, value in {**values, "seed_everything": self.seed}.items():
            drawn += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return self.filled([*words_of(self.fit), *words_of(self.methods[method].options), *more, *drawn])


def distribution(option: str, values: dict[str, Any]) -> BaseDistribution:
    """What Optuna draws an option's value from."""
    numbers = FloatDistribution if {float, str} & set(map(type, values.values())) else IntDistribution
    kind: type[Any] = CategoricalDistribution if "choices" in values else numbers
    try:
        # YAML reads 1e-5 as text.
        return kind(**{name: float(value) if isinstance(value, str) else value for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"search space of {option}: {' '.join(str(error).split())}") from error


class Search:
    """The trials of one method, each a run of `fit`, in an Optuna study that workers share."""

    def __init__(self, tuning: Tuning, method: str, more: Sequence[str] = ()) -> None:
        self.tuning, self.method, self.more = tuning, method, more
        space = tuning.methods[method].space
        self.space = {option: distribution(option, values) for option, values in space.items()}
        tuning.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(tuning.path / ".study.lock")
        url = tuning.storage and tuning.storage.replace("{folder}", str(tuning.path))
        storage = url or JournalStorage(JournalFileBackend(str(tuning.path / "journal.log")))
        about = {"rule": tuning.rule, "space": space, **made_of(tuning.options(method, {}, more))}
        with self._lock:
            self.study = optuna.create_study(
                storage=storage, study_name=method, direction="maximize", load_if_exists=True
            )
            # Earlier versions kept rule and space alone.
            if {**about, **self.study.user_attrs.get("about", {})} != about:
                raise UserError(
                    f"{tuning.path} holds trials of {method} with another rule or search space, or with other options "
                    "or configs; give another folder"
                )
            self.study.set_user_attr("about", about)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @property
    def chosen(self) -> int | None:
        """Number of the trial that the rule chooses; None if no complete one meets the conditions."""
        values = {trial.number: trial.value or 0.0 for trial in self.trials if meets(trial)}
        return max(values, key=values.__getitem__, default=None)

    def folder(self, trial: int) -> Path:
        return self.tuning.path / self.method / f"trial-{trial:03d}"

    def work(self) -> None:
        """Resume interrupted trials, under their numbers and values, then make new ones within the budget."""
        # Under the lock, since a trial that another worker is asking for does not have its values yet.
        with self._lock:
            running = [trial for trial in self.trials if trial.state == TrialState.RUNNING]
        for trial in running:
            # Optuna has no public way to a trial that another process asked for.
            self._make(Trial(self.study, trial._trial_id))
        while (new := self._ask()) is not None:
            self._make(new)

    def _ask(self) -> Trial | None:
        with self._lock:
            count = len(self.trials)
            if count >= self.tuning.trials:
                return None
            # The seed depends on the trial's number, so that workers do not draw the same values.
            self.study.sampler = optuna.samplers.TPESampler(seed=self.tuning.seed + count)
            return self.study.ask(self.space)

    def _make(self, trial: Trial) -> None:
        began, value, violations = time.monotonic(), None, {}
        log = self.tuning.path / "logs" / f"{self.method}-{trial.number:03d}.txt"
        options = self.tuning.options(self.method, trial.params, self.more)
        try:
            job = Job(self.folder(trial.number), options, self.tuning.path)
            job.make(log, wait=False)
            record = read_record(job.folder)
            violations = {condition: violation(condition, record) for condition in self.tuning.subject_to}
            value = measured(record, "final", self.tuning.maximize)
            result = f"{self.tuning.maximize} {value:.4g}, {time.monotonic() - began:.0f} s"
        except Taken:
            return
        except (RunFailed, NotANumber) as error:
            result = f"failed, {error}"
            trial.set_user_attr("error", str(error))
        with self._lock:
            if self.trials[trial.number].state.is_finished():
                return
            for condition, beyond in violations.items():
                trial.set_constraint(condition, beyond)
            self.study.tell(trial, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
            self._remove_models()
        name = f"{self.method}, trial {trial.number + 1} of {self.tuning.trials}"
        print(f"{name} ({show(trial.params)}): {result}", flush=True)

    def _remove_models(self) -> None:
        """Keep the model and the training state of the chosen trial only."""
        for trial in self.trials:
            if trial.state.is_finished() and trial.number != self.chosen:
                shutil.rmtree(self.folder(trial.number) / "model", ignore_errors=True)
                last = self.folder(trial.number) / "last.ckpt"
                shutil.rmtree(last) if last.is_dir() else last.unlink(missing_ok=True)

    def results(self) -> dict[str, Any]:
        """Search space, number of the chosen trial, and all trials."""
        entries = []
        for trial in self.trials:
            complete = trial.state == TrialState.COMPLETE
            record = read_record(self.folder(trial.number)) if complete else {}
            left = Verdict(record).left()
            entries.append(
                {
                    "trial": trial.number,
                    "state": trial.state.name.lower(),
                    "options": trial.params,
                    "value": trial.value if complete else None,
                    "meets": meets(trial),
                    "violations": trial.constraints,
                    "metrics": record.get("final", {}).get("metrics", {}),
                    "forgot": min(left.values()) < UNMOVED if left else None,
                    "seconds": record.get("seconds", {}).get("total"),
                    "error": trial.user_attrs.get("error", ""),
                }
            )
        return {"space": self.tuning.methods[self.method].space, "chosen": self.chosen, "trials": entries}


def meets(trial: FrozenTrial) -> bool:
    """Whether a trial is complete and meets the rule's conditions."""
    return trial.state == TrialState.COMPLETE and all(v <= 0 for v in trial.constraints.values())


def run(options: Namespace) -> None:
    tuning = read_plan(options.files, Tuning, options.folder)
    methods = options.methods or list(tuning.methods)
    for method in methods:
        if method not in tuning.methods:
            raise UserError(f"--methods {method}: no such method; the tuning has {', '.join(tuning.methods)}")
    drawn = {f"--{option}" for method in tuning.methods.values() for option in method.space} | {"--seed_everything"}
    if given := drawn & {word.partition("=")[0] for word in options.fit}:
        raise UserError(f"{min(given)}: the tuning file sets it for each trial; change it there")
    for method in methods:
        # Refused before the first trial, as far as it is known then: a rule that reads what no trial will measure.
        space = tuning.methods[method].space.items()
        first = {option: values.get("choices", [values.get("low")])[0] for option, values in space}
        begins = not options.table and not (tuning.path / method).is_dir()
        if begins and (record := to_measure(tuning.options(method, first, options.fit))):
            for condition in tuning.subject_to:
                violation(condition, record)
            measured(record, "final", tuning.maximize)
    searches = {method: Search(tuning, method, options.fit) for method in tuning.methods}
    if not options.table:
        for method in methods:
            searches[method].work()
    found = {method: search.results() for method, search in searches.items()}
    about = {"title": tuning.title, "rule": tuning.rule, "trials": tuning.trials, "seed": tuning.seed}
    write_json(tuning.path / "trials.json", {**about, "methods": found})
    write_tables(table(tuning, found), tuning.path / "trials.md", options.out)
    for method, search in searches.items():
        if (chosen := search.chosen) is not None:
            folder, file = search.folder(chosen), tuning.path / f"chosen_{method}.yaml"
            write_text(file, (folder / "config.yaml").read_text())
            print(f"{method}: trial {chosen} chosen; model: {folder / 'model'}, settings: {file}")


def table(tuning: Tuning, found: dict[str, dict[str, Any]]) -> str:
    """Rule, budget, search spaces, chosen trials and all trials; `found` has the `Search.results` of each method."""
    names = [tuning.maximize, *(name for name in SHOWN if name != tuning.maximize)]
    heads = ["trial", "state", "settings", tuning.maximize, *(title_of(name).short for name in names[1:]), "seconds"]
    lines = [f"# {tuning.title}", "", f"* Rule: {tuning.rule}."]
    lines.append(f"* Budget: {tuning.trials} trials of every method; failed ones count. Seed {tuning.seed}.")
    chosen, parts, notes = [], [], []
    for method, results in found.items():
        space = "; ".join(f"`{option}` {show(values)}" for option, values in results["space"].items())
        lines.append(f"* Search space of {method}: {space}.")
        rows = [_row(trial, trial["trial"] == results["chosen"], names) for trial in results["trials"]]
        done = sum(trial["state"] != "running" for trial in results["trials"])
        nothing = ["none meets the conditions" if done else "none is finished", *["-"] * (len(names) + 1)]
        best = nothing if results["chosen"] is None else rows[results["chosen"]][2:]
        chosen.append([method, f"{done} of {tuning.trials}", *best])
        known = [trial["forgot"] for trial in results["trials"] if trial["forgot"] is not None]
        if known and not any(known):
            notes += ["", f"No trial of {method} forgot anything: search higher learning rates or forget weights."]
        parts += ["", f"## {method}", "", markdown.table(heads, rows)]
    lines += ["", "## Chosen", "", markdown.table(["method", "trials", *heads[2:]], chosen), *notes, *parts]
    return "\n".join(lines) + "\n"


def _row(trial: dict[str, Any], chosen: bool, names: Sequence[str]) -> list[str]:
    state = {"running": "not finished", "fail": "failed"}.get(trial["state"], "beyond the conditions")
    if trial["meets"]:
        state = "**chosen**" if chosen else "finished"
    seconds = "-" if trial["seconds"] is None else f"{trial['seconds']:.0f}"
    metrics = [number(trial["metrics"].get(name)) for name in names]
    return [str(trial["trial"]), state, show(trial["options"]), *metrics, seconds]


def show(values: dict[str, Any]) -> str:
    """Values of a trial in one line, each option by its last name if no other has it."""
    last = [name.rsplit(".", 1)[-1] for name in values]
    names = [short if last.count(short) == 1 else name for short, name in zip(last, values, strict=True)]
    shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values())
    return ", ".join(map(" ".join, zip(names, shown, strict=True)))
