"""A run of `fit` in a process of its own, made once: finished ones are skipped, interrupted ones go on.

What makes several runs (a table, a tuning, a series) calls this for each; callers on several machines that share the
folders may do so at the same time.
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from simnpo_pl.runs.folder import RESULTS
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json

MADE_OF = "made_of.json"
"""In a run's folder: the options and the configs it was begun with."""
EVALUATIONS = ".evaluations"
"""In a study's folder: evaluations that its runs share."""


class RunFailed(UserError):
    """A run ended with an error; its message is the run's own."""


class Taken(Exception):
    """Another process is at this run."""


def fit_once(
    folder: Path,
    options: Sequence[str],
    study: Path,
    log: Path | None = None,
    wait: bool = True,
    command: str = "fit",
) -> dict[str, Any]:
    """Results of a run; it is made now, or gone on with, unless it is finished.

    Args:
        folder: Of the run.
        options: Of the command, without `--run_dir` and `--ckpt_path`.
        study: Folder of all runs that share their evaluations of start and retrained models.
        log: File for what the run prints; None leaves that to the terminal.
        wait: Whether to wait while another process is at this run.
        command: `fit` or `test`.

    Raises:
        Taken: Another process is at it, and `wait` is false.
        RunFailed: The run ended with an error.
        UserError: The folder holds a run with other options.
        SystemExit: The run was stopped by a signal.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.parent / f".{folder.name}.lock", timeout=-1 if wait else 0):
            _check_options(folder, options)
            record = read_record(folder)
            if record is None or not record.get("finished"):
                # Before the options, so that a folder they give wins.
                words = [command, "--eval.cache_dir", str(study / EVALUATIONS), *options, "--run_dir", str(folder)]
                _run(folder, words if command == "test" else [*words, "--ckpt_path", "last"], log)
                record = read_record(folder)
            assert record is not None
            return record
    except Timeout:
        raise Taken(str(folder)) from None


def read_record(folder: Path) -> dict[str, Any] | None:
    """Content of a run's results; None where there is none yet."""
    file = folder / RESULTS
    return read_json(file) if file.is_file() else None


def _check_options(folder: Path, options: Sequence[str]) -> None:
    """Note what a run is made of, and refuse one that was begun with something else."""
    file, found = folder / MADE_OF, _made_of(options)
    if not (folder / RESULTS).is_file():
        write_json(file, found)
        return
    if not file.is_file():
        raise UserError(f"{folder} holds a run that was not begun by this command; move it or choose another folder")
    known = read_json(file)
    different = [name for name in found if known.get(name) != json.loads(json.dumps(found[name], default=str))]
    if different:
        raise UserError(
            f"{folder} holds a run that was begun with other {' and '.join(different)} (see {file}); choose another "
            "folder, or remove this one to make the run again"
        )


def _made_of(options: Sequence[str]) -> dict[str, Any]:
    words, configs = list(options), []
    for position, word in enumerate(words[:-1]):
        if word == "--config":
            try:
                configs.append(yaml.safe_load(Path(words[position + 1]).expanduser().read_text()))
            except OSError as error:
                raise UserError(f"cannot read the config {words[position + 1]} ({error.strerror})") from error
    return {"options": words, "configs": configs}


def _run(folder: Path, words: Sequence[str], log: Path | None) -> None:
    code = start([sys.executable, "-m", "simnpo_pl", *words], log)
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
        print(f"stopped in {folder}; the same command goes on", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)
    if code:
        where = "see above" if log is None else f"{_last_words(log)}; its output is in {log}"
        raise RunFailed(f"the run in {folder} ended with exit code {code}: {where}")


def start(command: Sequence[str], log: Path | None = None) -> int:
    """Run a program to its end; its exit code.

    Args:
        command: The program and its arguments.
        log: File for what it prints; None leaves that to the terminal.
    """
    if log is None:
        return _wait(subprocess.Popen(command))
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        return _wait(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))


def _wait(process: subprocess.Popen) -> int:
    """Exit code of a run. A signal is the run's to handle: it saves its state and ends."""
    # An interrupt from a terminal reaches the run by itself, a signal to this process alone does not.
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate()) if main else None
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _last_words(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it printed nothing"])[-1]
