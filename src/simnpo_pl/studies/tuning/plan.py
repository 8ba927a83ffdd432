"""What a tuning file says: methods with their search spaces, the budget of each, the rule that chooses."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from simnpo_pl.studies.sweeps.plan import Words, read_plan, words_of
from simnpo_pl.utils.errors import UserError

EXAMPLE = "configs/tune/tofu_forget05.yaml"
_CONDITION = re.compile(r"(\S+) (>=|<=) (\S+?)( x (start|retrained))?")
_MEMBERSHIP = re.compile(r"(^|[/_])(mia|privleak|membership)")


@dataclass(frozen=True)
class Choice:
    """Values of an option: from `low` to `high`, or one of `choices`.

    Args:
        low: Least value; whole numbers at both ends are tried as whole numbers.
        high: Largest value.
        log: Whether equal ratios, not differences, are equally likely.
        choices: Values to choose among, in place of a range.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.choices:
            if (self.low, self.high) != (None, None):
                raise UserError("a search range has low and high, or choices: give one of them")
            return
        if self.low is None or self.high is None or not self.low < self.high:
            raise UserError(f"a search range needs low below high, or choices, got low {self.low}, high {self.high}")
        if self.log and self.low <= 0:
            raise UserError(f"a logarithmic search range must be above 0, got low {self.low}")

    def __str__(self) -> str:
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices))
        return f"{self.low:g} to {self.high:g}{', logarithmic' if self.log else ''}"


@dataclass(frozen=True)
class Method:
    """A method to tune.

    Args:
        options: Of `fit`, as on a command line.
        space: Option, without its dashes, to the values to try.
    """

    options: Words
    space: dict[str, Choice]


class Condition(NamedTuple):
    """A bound on a metric, such as `model_utility >= 0.95 x start`."""

    metric: str
    sign: str
    bound: float
    of: str
    """Model whose own value the bound multiplies; empty for a plain number."""

    def violation(self, record: dict[str, Any]) -> float:
        """How far a run is beyond the bound; 0 or less where it holds.

        Raises:
            NotANumber: The metric is none.
            UserError: It was not measured.
        """
        bound = self.bound * measured(record, self.of, self.metric) if self.of else self.bound
        value = measured(record, "final", self.metric)
        return bound - value if self.sign == ">=" else value - bound


class NotANumber(Exception):
    """A metric came out as no number, as that of a model that broke."""


def measured(record: dict[str, Any], model: str, metric: str) -> float:
    """A metric of a run's results.

    Args:
        record: Content of results.json.
        model: `start`, `retrained` or `final`.
        metric: Its name.

    Raises:
        NotANumber: It is none.
        UserError: It was not measured.
    """
    found = (record.get(model) or {}).get("metrics") or {}
    if metric not in found:
        reason = record.get("unavailable", {}).get(metric, f"measured are {', '.join(found) or 'none'}")
        raise UserError(f"the rule needs {metric} of the {model} model, which was not measured: {reason}")
    if found[metric] is None or not math.isfinite(found[metric]):
        raise NotANumber(f"{metric} of the {model} model is no number")
    return float(found[metric])


@dataclass(frozen=True)
class Tuning:
    """Content of a tuning file, `configs/tune/tofu_forget05.yaml` for example.

    Membership-inference metrics may not enter the rule: they measure what a tuned method is to be judged by.

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
        keep_models: Whether the models and checkpoints of all trials stay; else only those of each method's best.
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
    keep_models: bool = False

    def __post_init__(self) -> None:
        if not self.methods:
            raise UserError("the tuning has no methods: name at least one")
        if self.trials < 1:
            raise UserError(f"trials must be at least 1, got {self.trials}")
        for name, method in self.methods.items():
            if not method.space:
                raise UserError(f"{name} has no search space: name an option to tune")
        for metric in (self.maximise, *(condition.metric for condition in self.conditions)):
            if _MEMBERSHIP.search(metric):
                raise UserError(
                    f"the rule must not use {metric}: membership inference is what a tuned method is judged by, "
                    "choose by another metric"
                )

    @property
    def conditions(self) -> list[Condition]:
        """`subject_to`, read."""
        found = []
        for text in self.subject_to:
            match = _CONDITION.fullmatch(text.strip())
            try:
                found.append(Condition(match[1], match[2], float(match[3]), match[5] or ""))  # type: ignore[index]
            except (TypeError, ValueError):
                raise UserError(
                    f"subject_to {text!r}: expected METRIC >= NUMBER or METRIC <= NUMBER, with x start or x retrained "
                    "where the bound is a multiple of that model's value"
                ) from None
        return found

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder).expanduser()

    @property
    def rule(self) -> str:
        """The rule in words."""
        conditions = f" among trials with {' and '.join(self.subject_to)}" if self.subject_to else ""
        return f"the largest {self.maximise} of the exported model{conditions}"

    def options(self, method: str, values: dict[str, Any], more: Sequence[str]) -> list[str]:
        """Options of a trial's `fit`.

        Args:
            method: Its method.
            values: What the search chose.
            more: Further options of every run.
        """
        chosen = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        own = words_of(self.methods[method].options)
        words = [*words_of(self.fit), *own, *chosen, "--seed_everything", str(self.seed), *more]
        return [word.replace("{folder}", str(self.path)) for word in words]


def read_tuning(files: Sequence[Path]) -> Tuning:
    """The tuning in a file; files after it change it: methods by name, all else as a whole.

    Raises:
        UserError: A file is missing or holds something else, or the rule uses what it must not use.
    """
    return read_plan(files, Tuning, ("methods",), EXAMPLE)
