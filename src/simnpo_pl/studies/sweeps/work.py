"""A worker of a sweep: makes the runs of its share that nobody has made or is making."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from simnpo_pl.studies.launch import RunFailed, Taken, fit_once, read_record, start
from simnpo_pl.studies.sweeps.plan import Planned, Sweep
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json

AFTER = "after.json"
"""In a run's folder: the commands that went over it."""


def work(sweep: Sweep, runs: Sequence[Planned], models: Sequence[Planned]) -> list[str]:
    """Make the models, then the runs.

    Args:
        sweep: Where they go.
        runs: This worker's share.
        models: What the runs start from or compare with; waited for while another worker makes them.

    Returns:
        What failed, a line each; the rest was made all the same.

    Raises:
        UserError: A model failed, without which no run can start; or a folder holds a run with other options.
    """
    if any(not done(sweep, run) for run in runs):
        for model in models:
            _make(sweep, model, wait=True)
    failed = []
    for number, run in enumerate(runs, start=1):
        where = f"run {number} of {len(runs)}, {run.name}"
        try:
            told = _make(sweep, run, wait=False)
        except Taken:
            told = "another worker is at it"
        except RunFailed as error:
            failed.append(str(error))
            told = f"failed: {error}"
        print(f"{where}: {told}", flush=True)
    return failed


def done(sweep: Sweep, run: Planned) -> bool:
    """Whether a run is finished, and what comes after it."""
    folder = sweep.path / run.name
    record = read_record(folder)
    return bool(record and record.get("finished")) and all(_is_after(folder, command) for command in run.after)


def _make(sweep: Sweep, run: Planned, wait: bool) -> str:
    """Make a run or model unless it is there; what was done, in a few words."""
    folder, began = sweep.path / run.name, time.monotonic()
    log = sweep.path / "logs" / f"{run.name.replace('/', '_')}.txt"
    if run.command == "task-vector":
        return _task_vector(folder, run, log)
    record = read_record(folder)
    finished = bool(record and record.get("finished"))
    if wait and not finished:
        print(f"model {run.name}: being made", flush=True)
    fit_once(folder, run.options, sweep.path, log, wait, run.command)
    for command in run.after:
        with FileLock(folder / ".after.lock"):
            if not _is_after(folder, command):
                finished = False
                _over(folder, command, log.with_suffix(".after.txt"))
    return "finished before" if finished else f"{time.monotonic() - began:.0f} s"


def _task_vector(folder: Path, run: Planned, log: Path) -> str:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            return "finished before"
        command = [sys.executable, "-m", "simnpo_pl", run.command, *run.options, "--out", str(folder)]
        if code := start(command, log):
            raise UserError(f"{run.command} for {folder} ended with exit code {code}; its output is in {log}")
    return "made"


def _over(folder: Path, command: Sequence[str], log: Path) -> None:
    if code := start([sys.executable, "-m", "simnpo_pl", *command], log):
        raise RunFailed(f"{command[0]} over {folder} ended with exit code {code}; its output is in {log}")
    write_json(folder / AFTER, [*_commands(folder), list(command)])


def _commands(folder: Path) -> list[list[str]]:
    file = folder / AFTER
    return json.loads(file.read_text()) if file.is_file() else []


def _is_after(folder: Path, command: Sequence[str]) -> bool:
    return list(command) in _commands(folder)
