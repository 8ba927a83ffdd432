"""The search: every trial is a run of `fit`, noted in an Optuna study that workers share."""

import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from simnpo_pl.studies.launch import RunFailed, Taken, fit_once
from simnpo_pl.studies.tuning.plan import Choice, NotANumber, Tuning, measured
from simnpo_pl.utils.errors import UserError

NOTE = "note"


class Note(TypedDict):
    """What a finished trial leaves beside its values."""

    violations: list[float]
    """Of the rule's conditions; 0 or less where they hold."""
    metrics: dict[str, float]
    """Of the exported model."""
    seconds: float | None
    """Wall time of the run."""
    error: str
    """Why it failed; empty where it did not."""


class Search:
    """The trials of one method.

    A trial's number is given under a lock, so workers never make more than the budget. One whose worker is gone is
    taken up by the next: its run goes on from its last checkpoint.

    Args:
        tuning: What is tuned, and how.
        method: Name of the method.
        more: Further options of every run.
    """

    def __init__(self, tuning: Tuning, method: str, more: Sequence[str] = ()) -> None:
        self.tuning = tuning
        self.method = method
        self.more = more
        self.space = {name: distribution(choice) for name, choice in tuning.methods[method].space.items()}
        tuning.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(tuning.path / ".study.lock")
        with self._lock:
            self.study = optuna.create_study(
                storage=_storage(tuning), study_name=method, direction="maximize", load_if_exists=True
            )
            about = {"rule": tuning.rule, "space": {name: str(c) for name, c in tuning.methods[method].space.items()}}
            known = self.study.user_attrs.get("about")
            if known is not None and known != about:
                raise UserError(
                    f"{tuning.path} holds trials of {method} with another rule or search space; choose another folder"
                )
            self.study.set_user_attr("about", about)

    def note(self, trial: FrozenTrial) -> Note:
        """What a finished trial noted."""
        return trial.user_attrs[NOTE]

    def meets(self, trial: FrozenTrial) -> bool:
        """Whether a trial is whole and meets the rule's conditions."""
        return trial.state == TrialState.COMPLETE and all(v <= 0 for v in self.note(trial)["violations"])

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self.study.get_trials(deepcopy=False)[: self.tuning.trials]

    def best(self) -> FrozenTrial | None:
        """What the rule chooses; None where no finished trial meets its conditions."""
        return max(filter(self.meets, self.trials), key=lambda trial: (trial.value, -trial.number), default=None)

    def folder(self, trial: int) -> Path:
        """Folder of a trial's run."""
        return self.tuning.path / self.method / f"trial-{trial:03d}"

    def work(self) -> None:
        """Make trials until the budget is spent and none is left that nobody is at."""
        while (trial := self._next()) is not None:
            self._make(trial)

    def _next(self) -> Trial | None:
        """A trial to make: one whose worker is gone, or a new one."""
        with self._lock:
            known = self.study.get_trials(deepcopy=False)
            for trial in known:
                if trial.state == TrialState.RUNNING and self._is_free(trial.number):
                    return Trial(self.study, trial._trial_id)
            if len(known) >= self.tuning.trials:
                return None
            # Of the trial's own number, so that workers do not draw the same values.
            seed = zlib.crc32(f"{self.tuning.seed} {self.method} {len(known)}".encode())
            self.study.sampler = optuna.samplers.TPESampler(seed=seed)
            return self.study.ask(self.space)

    def _is_free(self, trial: int) -> bool:
        folder = self.folder(trial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{folder.name}.lock")
        try:
            with lock.acquire(timeout=0):
                return True
        except TimeoutError:
            return False

    def _make(self, trial: Trial) -> None:
        folder, began = self.folder(trial.number), time.monotonic()
        name = f"{self.method}, trial {trial.number + 1} of {self.tuning.trials}"
        log = self.tuning.path / "logs" / f"{self.method}-{trial.number:03d}.txt"
        try:
            options = self.tuning.options(self.method, trial.params, self.more)
            record = fit_once(folder, options, self.tuning.path, log, wait=False)
            value = measured(record, "final", self.tuning.maximise)
            violations = [condition.violation(record) for condition in self.tuning.conditions]
            seconds = record.get("seconds", {}).get("total")
            note = Note(violations=violations, metrics=record["final"]["metrics"], seconds=seconds, error="")
            self._tell(trial, value, note)
            told = f"{self.tuning.maximise} {value:.4g}, {time.monotonic() - began:.0f} s"
        except Taken:
            return
        except (RunFailed, NotANumber) as error:
            self._tell(trial, None, Note(violations=[], metrics={}, seconds=None, error=str(error)))
            told = f"failed, {error}"
        print(f"{name} ({describe(trial.params)}): {told}", flush=True)

    def _tell(self, trial: Trial, value: float | None, note: Note) -> None:
        with self._lock:
            if self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
                return
            trial.set_user_attr(NOTE, note)
            for condition, violation in zip(self.tuning.subject_to, note["violations"], strict=False):
                trial.set_constraint(condition, violation)
            self.study.tell(trial, value, TrialState.FAIL if value is None else TrialState.COMPLETE)
            if not self.tuning.keep_models:
                self._thin()

    def _thin(self) -> None:
        """Remove what takes the most room of every finished trial but the best."""
        best = self.best()
        for trial in self.trials:
            if trial.state.is_finished() and (best is None or trial.number != best.number):
                shutil.rmtree(self.folder(trial.number) / "model", ignore_errors=True)
                last = self.folder(trial.number) / "last.ckpt"
                shutil.rmtree(last) if last.is_dir() else last.unlink(missing_ok=True)


def describe(values: dict[str, Any]) -> str:
    """Values of a trial in one line, each option by its last name."""
    shown = {name.rsplit(".", 1)[-1]: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def distribution(choice: Choice) -> BaseDistribution:
    """What Optuna draws an option's value from."""
    if choice.choices:
        return CategoricalDistribution(choice.choices)
    assert choice.low is not None
    assert choice.high is not None
    if isinstance(choice.low, int) and isinstance(choice.high, int):
        return IntDistribution(choice.low, choice.high, log=choice.log)
    return FloatDistribution(choice.low, choice.high, log=choice.log)


def _storage(tuning: Tuning) -> BaseStorage | str:
    if tuning.storage is not None:
        return tuning.storage.replace("{folder}", str(tuning.path))
    return JournalStorage(JournalFileBackend(str(tuning.path / "journal.log")))
