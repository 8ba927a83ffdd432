"""What a tuning file says, and the search: every trial is a run of `fit`, in an Optuna study that workers share.

Not `Study.optimize`: it neither resumes a trial whose worker is gone nor keeps workers together within a budget.
"""

import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from simnpo_pl.studies.launch import RunFailed, Taken, fit_once, read_record
from simnpo_pl.studies.options import path
from simnpo_pl.studies.plans import Words, read_plan, words_of
from simnpo_pl.utils.errors import UserError

optuna.logging.set_verbosity(optuna.logging.WARNING)
_CONDITION = re.compile(r"(\S+) (>=|<=) ([\d.e+-]+)(?: x (start|retrained))?")
_MEMBERSHIP = re.compile(r"(^|[/_])(mia|privleak|membership)")


class NotANumber(Exception):
    """A metric is not a finite number, as that of a model that broke."""


def measured(record: dict[str, Any], model: str, metric: str) -> float:
    """A metric of the `start`, `retrained` or `final` model in a run's results."""
    found = (record.get(model) or {}).get("metrics") or {}
    if metric not in found:
        reason = record.get("unavailable", {}).get(metric, f"measured are {', '.join(found) or 'none'}")
        raise UserError(f"the rule needs {metric} of the {model} model, which was not measured: {reason}")
    if found[metric] is None or not math.isfinite(found[metric]):
        raise NotANumber(f"{metric} of the {model} model is no number")
    return float(found[metric])


class Condition(NamedTuple):
    """A bound on a metric, such as `model_utility >= 0.95 x start`."""

    metric: str
    sign: str
    bound: float
    of: str | None

    def violation(self, record: dict[str, Any]) -> float:
        """How far a run is beyond the bound; 0 or less if it holds."""
        bound = self.bound * measured(record, self.of, self.metric) if self.of else self.bound
        value = measured(record, "final", self.metric)
        return bound - value if self.sign == ">=" else value - bound


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


@dataclass(frozen=True)
class Tuning:
    """Content of a tuning file, such as `configs/tune/tofu_forget05.yaml`.

    The rule refuses membership-inference metrics: they measure what a tuned method is judged by.

    Args:
        title: Of the table.
        folder: Holds the runs, and the journal of trials unless `storage` names another place.
        methods: What is tuned.
        trials: Of every method, the same for all.
        maximise: Metric of the exported model that the rule maximises.
        subject_to: Conditions that a trial must meet to be chosen: `METRIC >= NUMBER`, `METRIC <= NUMBER`, or with
            `x start` or `x retrained` that multiple of this model's own value.
        fit: Options of every run, before those of the method.
        seed: Of the search, and of every run.
        storage: URL of an Optuna storage that workers share, such as sqlite:///tune.db; null keeps a journal file.
    """

    title: str
    folder: str
    methods: dict[str, Method]
    trials: int
    maximise: str
    subject_to: list[str] = field(default_factory=list)
    fit: Words = ""
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
        for metric in (self.maximise, *(condition.metric for condition in self.conditions)):
            if _MEMBERSHIP.search(metric):
                raise UserError(
                    f"the rule must not use {metric}: membership inference is what a tuned method is judged by, "
                    "choose by another metric"
                )

    @property
    def path(self) -> Path:
        return path(self.folder)

    @property
    def conditions(self) -> list[Condition]:
        found = []
        for text in self.subject_to:
            match = _CONDITION.fullmatch(text.strip())
            if match is None:
                raise UserError(
                    f"subject_to {text!r}: expected METRIC >= NUMBER or METRIC <= NUMBER, with x start or x retrained "
                    "where the bound is a multiple of that model's value"
                )
            found.append(Condition(match[1], match[2], float(match[3]), match[4]))
        return found

    @property
    def rule(self) -> str:
        """The rule in words."""
        conditions = f" among trials with {' and '.join(self.subject_to)}" if self.subject_to else ""
        return f"the largest {self.maximise} of the exported model{conditions}"

    def options(self, method: str, values: dict[str, Any], more: Sequence[str]) -> list[str]:
        """Options of a trial's `fit`: those of the file, the values that the search chose, and `more`."""
        chosen = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        own = words_of(self.methods[method].options)
        words = [*words_of(self.fit), *own, *chosen, "--seed_everything", str(self.seed), *more]
        return [word.replace("{folder}", str(self.path)) for word in words]


def read_tuning(files: Sequence[Path]) -> Tuning:
    """The tuning in a file; later files change it: methods by name, all else as a whole."""
    return read_plan(files, Tuning, "configs/tune/tofu_forget05.yaml", by_name=("methods",))


class Search:
    """The trials of one method; `more` are further options of every run."""

    def __init__(self, tuning: Tuning, method: str, more: Sequence[str] = ()) -> None:
        self.tuning = tuning
        self.method = method
        self.more = more
        space = tuning.methods[method].space
        self.space = {option: distribution(option, values) for option, values in space.items()}
        tuning.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(tuning.path / ".study.lock")
        url = tuning.storage and tuning.storage.replace("{folder}", str(tuning.path))
        storage = url or JournalStorage(JournalFileBackend(str(tuning.path / "journal.log")))
        about = {"rule": tuning.rule, "space": space}
        with self._lock:
            self.study = optuna.create_study(
                storage=storage, study_name=method, direction="maximize", load_if_exists=True
            )
            if self.study.user_attrs.get("about", about) != about:
                raise UserError(
                    f"{tuning.path} holds trials of {method} with another rule or search space; give another folder"
                )
            self.study.set_user_attr("about", about)

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)[: self.tuning.trials]

    @property
    def chosen(self) -> int | None:
        """Number of the trial that the rule chooses; None if no complete one meets its conditions."""
        values = {trial.number: trial.value or 0.0 for trial in self.trials if meets(trial)}
        return max(values, key=values.__getitem__, default=None)

    def folder(self, number: int) -> Path:
        return self.tuning.path / self.method / f"trial-{number:03d}"

    def work(self) -> None:
        """Resume trials whose worker is gone, under their numbers and values, then make new ones within the budget."""
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
            if count == self.tuning.trials:
                return None
            # The seed depends on the trial's number, so that workers do not draw the same values.
            self.study.sampler = optuna.samplers.TPESampler(seed=self.tuning.seed + count)
            return self.study.ask(self.space)

    def _make(self, trial: Trial) -> None:
        began, value, violations = time.monotonic(), None, []
        log = self.tuning.path / "logs" / f"{self.method}-{trial.number:03d}.txt"
        options = self.tuning.options(self.method, trial.params, self.more)
        try:
            record = fit_once(self.folder(trial.number), options, self.tuning.path, log, wait=False)
            violations = [condition.violation(record) for condition in self.tuning.conditions]
            value = measured(record, "final", self.tuning.maximise)
            said = f"{self.tuning.maximise} {value:.4g}, {time.monotonic() - began:.0f} s"
        except Taken:
            return
        except (RunFailed, NotANumber) as error:
            said = f"failed, {error}"
            trial.set_user_attr("error", str(error))
        with self._lock:
            if self.trials[trial.number].state.is_finished():
                return
            for condition, violation in zip(self.tuning.subject_to, violations, strict=False):
                trial.set_constraint(condition, violation)
            self.study.tell(trial, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
            self._remove_models()
        name = f"{self.method}, trial {trial.number + 1} of {self.tuning.trials}"
        print(f"{name} ({show(trial.params)}): {said}", flush=True)

    def _remove_models(self) -> None:
        """Keep the model and the training state of the chosen trial only."""
        for trial in self.trials:
            if trial.state.is_finished() and trial.number != self.chosen:
                shutil.rmtree(self.folder(trial.number) / "model", ignore_errors=True)
                last = self.folder(trial.number) / "last.ckpt"
                shutil.rmtree(last) if last.is_dir() else last.unlink(missing_ok=True)

    def results(self) -> dict[str, Any]:
        """Search space, number of the chosen trial, and all trials."""
        space, trials = self.tuning.methods[self.method].space, [self._entry(trial) for trial in self.trials]
        return {"space": space, "chosen": self.chosen, "trials": trials}

    def _entry(self, trial: FrozenTrial) -> dict[str, Any]:
        complete = trial.state == TrialState.COMPLETE
        record = (read_record(self.folder(trial.number)) or {}) if complete else {}
        return {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "options": trial.params,
            "value": trial.value if complete else None,
            "meets": meets(trial),
            "violations": trial.constraints,
            "metrics": record.get("final", {}).get("metrics", {}),
            "seconds": record.get("seconds", {}).get("total"),
            "error": trial.user_attrs.get("error", ""),
        }


def meets(trial: FrozenTrial) -> bool:
    """Whether a trial is complete and meets the rule's conditions."""
    return trial.state == TrialState.COMPLETE and all(v <= 0 for v in trial.constraints.values())


def distribution(option: str, values: dict[str, Any]) -> BaseDistribution:
    """What Optuna draws an option's value from."""
    kind: type[Any] = IntDistribution
    if "choices" in values:
        kind = CategoricalDistribution
    elif any(isinstance(values.get(end), float) for end in ("low", "high")):
        kind = FloatDistribution
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"search space of {option}: {' '.join(str(error).split())}") from error


def show(values: dict[str, Any]) -> str:
    """Values of a trial in one line, each option by its last name."""
    shown = {name.rsplit(".", 1)[-1]: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
