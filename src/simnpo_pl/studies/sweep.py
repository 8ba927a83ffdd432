"""A table of the paper: the runs of a sweep file, methods x splits x seeds, and the table of what they found.

    python -m simnpo_pl sweep configs/sweep/table1.yaml -o results/table1.md
    python -m simnpo_pl sweep configs/sweep/table1.yaml --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

Files after the first change it. Finished runs are skipped and interrupted ones resume; workers that share the folder
never take the same run. All other options are options of every run, after those of the file.
"""

import shlex
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from simnpo_pl.studies.launch import Job, RunFailed, Taken
from simnpo_pl.studies.options import path
from simnpo_pl.studies.plans import Words, read_plan, words_of
from simnpo_pl.studies.sweep_tables import COLUMNS, table
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_text

STARTED_BY = ("fit", "test", "task-vector")


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file, such as `configs/sweep/table1.yaml`.

    In options `{folder}`, `{split}` and `{seed}` stand for the sweep's folder, the run's split and its seed, and in
    `after` `{run}` for the run's own folder. Options may begin with `test` or `task-vector`; the default is `fit`.

    Args:
        title: Of the table.
        folder: Holds the runs.
        table: Which columns, see `sweep_tables.COLUMNS`.
        methods: Row of the table to the options of its runs.
        splits: Part of the table to the options of its runs.
        seeds: A run each.
        fit: Options of every run, before those of split and method.
        models: Models made before the runs: name to options; the folder is `{folder}/models/NAME`.
        after: Commands over each finished run.
        note: Text below the table.
    """

    title: str
    folder: str
    table: str
    methods: dict[str, Words]
    splits: dict[str, Words] = field(default_factory=lambda: {"all": ""})
    seeds: list[int] = field(default_factory=lambda: [0])
    fit: Words = ""
    models: dict[str, Words] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        for part in ("methods", "splits", "seeds"):
            if not getattr(self, part):
                raise UserError(f"the sweep has no {part}: name at least one")
        if self.table not in COLUMNS:
            raise UserError(f"the sweep's table is {self.table!r}; known are {', '.join(COLUMNS)}")

    @property
    def path(self) -> Path:
        return path(self.folder)

    def runs(self, more: Sequence[str] = ()) -> dict[tuple[str, str, int], Job]:
        """Runs by split, method and seed, in the order in which they are made; `more` are options of each."""
        jobs = {}
        for split, of_split in self.splits.items():
            for method, of_method in self.methods.items():
                command, own = _command(of_method)
                for seed in self.seeds:
                    folder = self.path / split / method / f"seed-{seed}"
                    values = {"split": split, "seed": str(seed), "run": str(folder)}
                    words = [*words_of(self.fit), *words_of(of_split), *own, "--seed_everything", str(seed), *more]
                    after = [self._filled(words_of(line), **values) for line in self.after]
                    jobs[split, method, seed] = Job(folder, self._filled(words, **values), self.path, command, after)
        return jobs

    def made_models(self, more: Sequence[str] = ()) -> list[Job]:
        """Models that runs start from or compare with; `more` are options of each that is a run."""
        jobs = []
        for name, words in self.models.items():
            command, own = _command(words)
            options = own if command == "task-vector" else [*own, *more]
            jobs.append(Job(self.path / "models" / name, self._filled(options), self.path, command))
        return jobs

    def _filled(self, words: Sequence[str], **values: str) -> list[str]:
        # Not str.format: prompt templates contain braces.
        filled = list(words)
        for name, value in {"folder": str(self.path), **values}.items():
            filled = [word.replace("{" + name + "}", value) for word in filled]
        return filled


def read_sweep(files: Sequence[Path]) -> Sweep:
    """The sweep in a file; later files change it: methods and models by name, all else as a whole."""
    return read_plan(files, Sweep, "configs/sweep/table1.yaml", by_name=("methods", "models"))


def run(options: Namespace) -> None:
    sweep = read_sweep(options.files)
    if options.folder is not None:
        sweep = replace(sweep, folder=options.folder)
    runs, models = sweep.runs(options.fit), sweep.made_models(options.fit)
    share = list(runs.values())[options.shard]
    if options.list:
        for words in [words for job in (*models, *share) for words in (job.words, *job.after)]:
            print(shlex.join(["python", "-m", "simnpo_pl", *words]))
        return
    failed = [] if options.table else work(sweep.path, share, models)
    finished = {key: job.folder for key, job in runs.items() if job.is_finished}
    text = table(sweep.title, sweep.table, list(runs), finished, sweep.note)
    print(text)
    if options.out is not None:
        write_text(options.out, text)
        print(f"written: {options.out}")
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first: {failed[0]}")


def work(folder: Path, runs: Sequence[Job], models: Sequence[Job]) -> list[str]:
    """Make the models, or wait until another worker has made them, then the runs that nobody else makes.

    Returns:
        What failed, a line each; a model that fails ends the sweep.
    """

    def log(job: Job) -> Path:
        return folder / "logs" / f"{'_'.join(job.folder.relative_to(folder).parts)}.txt"

    if any(job.remaining() for job in runs):
        for job in models:
            if job.remaining():
                print(f"making {job.folder}", flush=True)
            job.make(log(job))
    failed = []
    for count, job in enumerate(runs, start=1):
        began, remaining = time.monotonic(), job.remaining()
        try:
            job.make(log(job), wait=False)
            said = f"{time.monotonic() - began:.0f} s" if remaining else "finished before"
        except Taken:
            said = "another worker makes it"
        except RunFailed as error:
            failed.append(str(error))
            said = f"failed: {error}"
        print(f"run {count} of {len(runs)}, {job.folder.relative_to(folder)}: {said}", flush=True)
    return failed


def _command(words: Words) -> tuple[str, list[str]]:
    """Command and options; without a command they are those of `fit`."""
    split = words_of(words)
    if not split or split[0].startswith("-"):
        return "fit", split
    if split[0] not in STARTED_BY:
        raise UserError(f"options {' '.join(split)[:80]!r}: begin with an option, or with {', '.join(STARTED_BY)}")
    return split[0], split[1:]
