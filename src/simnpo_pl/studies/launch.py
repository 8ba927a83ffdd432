"""Runs in processes of their own: finished runs are skipped, interrupted ones resumed.

Workers on several machines may share the folders: a run is locked while it is made.
"""

import hashlib
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from simnpo_pl.studies.plans import read_yaml
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json

RESULTS = "results.json"
MADE_OF = "made_of.json"
"""In a run's folder: the options and configs it was started with."""
EVALUATIONS = ".evaluations"
"""In a study's folder: evaluations that its runs share."""
MODEL_COMMANDS = ("perturb", "task-vector")
"""Commands that make a model without training."""
AFTER = "after.json"
"""In a run's folder: the commands that ran over the finished run."""
_ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = (*(128 + number for number in _ASKED), *(-number for number in _ASKED))
"""Exit codes of a program that was asked to stop: by itself, after it saved, or at once; not of one that was killed."""


class RunFailed(UserError):
    """A run ended with an error."""


class Taken(Exception):
    """Another process makes this run."""


@dataclass(frozen=True)
class Job:
    """A run of `fit` or `test`, or a model of `MODEL_COMMANDS`, and the commands over it `after` it is finished.

    `options` come without `--run_dir`, `--out` and `--ckpt_path`. The runs of a study share, in its folder, their
    evaluations of start and retrained models.
    """

    folder: Path
    options: Sequence[str]
    study: Path
    command: str = "fit"
    after: list[list[str]] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        """The command line, without `python -m simnpo_pl`."""
        target = "--out" if self.command in MODEL_COMMANDS else "--run_dir"
        return [self.command, *self.options, target, str(self.folder)]

    @property
    def is_finished(self) -> bool:
        """Whether its own command is done."""
        if self.command in MODEL_COMMANDS:
            return self.folder.is_dir()
        return bool(read_record(self.folder).get("finished"))

    def remaining(self) -> list[list[str]]:
        """Command lines that still have to run."""
        own = self.words
        if self.command not in MODEL_COMMANDS:
            # Before the options, so that a folder among them wins.
            own[1:1] = ["--eval.cache_dir", str(self.study / EVALUATIONS)]
        if self.command == "fit":
            own += ["--ckpt_path", "last"]
        done = self._done()
        return [*([] if self.is_finished else [own]), *(words for words in self.after if words not in done)]

    def make(self, log: Path | None = None, wait: bool = True) -> None:
        """Run what remains; output goes to the terminal if there is no log.

        Raises `Taken` if another process makes this run and `wait` is false, `RunFailed` if a command ended with an
        error, and SystemExit if a signal stopped it.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder.parent / f".{self.folder.name}.lock", timeout=-1 if wait else 0):
                self.check_options()
                for words in self.remaining():
                    after = words in self.after
                    own = log.with_suffix(f".after-{self.after.index(words) + 1}.txt") if log and after else log
                    _call(self.folder, words, own)
                    if after:
                        write_json(self.folder / AFTER, [*self._done(), words])
        except Timeout:
            raise Taken(str(self.folder)) from None

    def _done(self) -> list[list[str]]:
        return read_json(self.folder / AFTER) if (self.folder / AFTER).is_file() else []

    def check_options(self) -> None:
        """Note options, configs and model files of a new run; refuse a run that was started with others."""
        if self.command in MODEL_COMMANDS:
            return
        asked, file = made_of(self.options), self.folder / MADE_OF
        if self.command == "test" and (files := _model_files(self.options)):
            asked["model files"] = files
        # A mistyped option leaves nothing else behind, and may be corrected.
        if all(path == file for path in self.folder.glob("[!.]*")):
            write_json(file, asked)
        elif not file.is_file():
            raise UserError(f"{self.folder} holds a run that this command did not start; give another folder")
        elif different := [name for name, value in read_json(file).items() if value != asked.get(name, value)]:
            raise UserError(
                f"{self.folder} holds a run that was started with other {' and '.join(different)} (see {file}); give "
                "these, or another folder, or remove this one to make the run again"
            )


def made_of(options: Sequence[str]) -> Any:
    """Options and the content of their configs, as JSON."""
    configs = [read_yaml(Path(file)) for option, file in pairwise(options) if option == "--config"]
    return json.loads(json.dumps({"options": options, "configs": configs}, default=str))


def _model_files(options: Sequence[str]) -> dict[str, str]:
    """Digests of weights and configs of the model that options name; none of a hub id."""
    folder, found = Path(dict(pairwise(options)).get("--model.name", "/")).expanduser(), {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        with file.open("rb") as content:
            found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """Results of a run; empty if it has none yet."""
    return read_json(folder / RESULTS) if (folder / RESULTS).is_file() else {}


class NotANumber(Exception):
    """A metric is not finite, such as one of a model that diverged."""


def measured(record: dict[str, Any], model: str, metric: str) -> float:
    """A metric of the `start`, `retrained` or `final` model in a run's results."""
    found = (record.get(model) or {}).get("metrics") or {}
    if metric not in found:
        reason = record.get("unavailable", {}).get(metric, f"measured are {', '.join(found) or 'none'}")
        raise UserError(f"the rule needs {metric} of the {model} model, which was not measured: {reason}")
    if found[metric] is None or not math.isfinite(found[metric]):
        raise NotANumber(f"{metric} of the {model} model is not a number")
    return float(found[metric])


def start(command: Sequence[str], log: Path | None = None) -> int:
    """Run a program and return its exit code; on a signal it saves its state, and this process ends with it."""
    told: list[int] = []

    def stop(signum: int, _: Any) -> None:
        told.append(signum)
        # An interrupt from a terminal reaches the program by itself.
        if signum == signal.SIGTERM:
            process.terminate()

    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if log is None else log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT)
        stops = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, stop) for number in stops}
        process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if told and process.returncode not in STOPPED:
        print("stopped; repeat the command to go on", file=sys.stderr)
        sys.exit(process.returncode or 128 + told[0])
    return process.returncode


def _call(folder: Path, words: Sequence[str], log: Path | None) -> None:
    code = start([sys.executable, "-m", "simnpo_pl", *words], log)
    if code in STOPPED:
        print(f"stopped in {folder}; repeat the command to resume", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
    if code:
        reason = "see above"
        if log is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            reason = f"{(errors or lines or ['it printed nothing'])[-1]}; its output is in {log}"
        raise RunFailed(f"{words[0]} in {folder} ended with exit code {code}: {reason}")
