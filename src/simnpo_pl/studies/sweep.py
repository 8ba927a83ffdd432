"""A table of the paper: the runs of a sweep file, methods x splits x seeds, and the table of their results.

    python -m simnpo_pl sweep configs/sweep/table1.yaml -o results/table1.md
    python -m simnpo_pl sweep configs/sweep/table1.yaml --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

Files after the first change it. Finished runs are skipped and interrupted ones resumed; workers that share the folder
never make the same run. All other options are options of every run, after those of the file.
"""

import shlex
import time
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from simnpo_pl.metrics.titles import number
from simnpo_pl.report.drawing import check_installed, panels, plain
from simnpo_pl.report.figures import GREY, color
from simnpo_pl.report.robustness import Spread, spread
from simnpo_pl.runs.record import Row, Run, read_runs
from simnpo_pl.studies.launch import MODEL_COMMANDS, Job, RunFailed, Taken
from simnpo_pl.studies.plans import Plan, Words, read_plan, words_of, write_tables
from simnpo_pl.studies.weights import by_order, qualities
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError

STARTED_BY = ("fit", "test", *MODEL_COMMANDS)
Key = tuple[str, str, int]
"""Split, method and seed of a run."""
COLUMNS = {
    "tofu": {
        "forget 1-R": "1 - forget/rouge",
        "1-P": "1 - forget/probability",
        "T": "forget/truth_ratio",
        "FQ": "forget_quality",
        **{
            f"{title} {short}": f"{split}/{name}"
            for split, title in (("real_authors", "authors"), ("world_facts", "facts"), ("retain", "retain"))
            for name, short in (("rouge", "R"), ("probability", "P"), ("truth_ratio", "T"))
        },
        "MU": "model_utility",
        "n": "n",
    },
    "halves": {
        "FQ strongly memorized": "forget_quality strong",
        "FQ weakly memorized": "forget_quality weak",
        "MU": "model_utility",
        "n": "n",
    },
    "quality": {
        "FQ": "forget_quality",
        "KS": "forget_quality/ks_statistic",
        "MU": "model_utility",
        "forget P": "forget/probability",
        "retain P": "retain/probability",
        "n": "n",
    },
    "muse": {
        "VerbMem forget": "verbmem_forget",
        "KnowMem forget": "knowmem_forget",
        "PrivLeak": "privleak",
        "KnowMem retain": "knowmem_retain",
    },
    "wmdp_bio": {"1 - Bio acc.": "1 - lm_eval wmdp_bio", "MMLU acc.": "lm_eval mmlu"},
}
"""Kind of table to its columns: title to a name that `value` knows."""
BY_DEFINITION = {
    **{"forget_quality": 1.0, "forget_quality strong": 1.0, "forget_quality weak": 1.0},
    **{"forget_quality/ks_statistic": 0.0, "privleak": 0.0},
}
"""Values of the retrained model compared with itself."""
STYLES = {"start": "--", "retrained": ":"}
"""Lines of a figure."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Plan):
    """Content of a sweep file, such as `configs/sweep/table1.yaml`.

    `{split}` and `{seed}` in options are those of the run, `{run}` in `after` is the run's folder. Options may begin
    with `test`, `perturb` or `task-vector`; the default is `fit`.

    Args:
        table: Which columns, a key of `COLUMNS`.
        methods: Row of the table to the options of its runs.
        splits: Section of the table to the options of its runs.
        seeds: A run each.
        models: Models made before the runs: name to options; the folder is `{folder}/models/NAME`.
        after: Commands over each finished run.
        note: Text below the table.
    """

    EXAMPLE = "configs/sweep/table1.yaml"
    BY_NAME = ("methods", "models")

    table: str
    methods: dict[str, Words]
    splits: dict[str, Words] = field(default_factory=lambda: {"all": ""})
    seeds: list[int] = field(default_factory=lambda: [0])
    models: dict[str, Words] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        for part in ("methods", "splits", "seeds"):
            if not getattr(self, part):
                raise UserError(f"the sweep has no {part}: name at least one")
        if self.table not in COLUMNS:
            raise UserError(f"the sweep's table is {self.table!r}; known are {', '.join(COLUMNS)}")

    def runs(self, more: Sequence[str] = ()) -> dict[Key, Job]:
        """Runs in the order in which they are made; `more` are options of each."""
        jobs = {}
        for split, method, seed in product(self.splits, self.methods, self.seeds):
            command, own = _command(self.methods[method])
            folder = self.path / split / method / f"seed-{seed}"
            values = {"split": split, "seed": str(seed), "run": str(folder)}
            words = [*words_of(self.fit), *words_of(self.splits[split]), *own, "--seed_everything", str(seed), *more]
            after = [self.filled(words_of(line), **values) for line in self.after]
            jobs[split, method, seed] = Job(folder, self.filled(words, **values), self.path, command, after)
        return jobs

    def made_models(self, more: Sequence[str] = ()) -> list[Job]:
        """Models that runs start from or compare with; `more` are options of each that is a run."""
        jobs = []
        for name, words in self.models.items():
            command, own = _command(words)
            options = own if command in MODEL_COMMANDS else [*own, *more]
            jobs.append(Job(self.path / "models" / name, self.filled(options), self.path, command))
        return jobs


def _command(words: Words) -> tuple[str, list[str]]:
    """Command and options; the default command is `fit`."""
    split = words_of(words)
    if not split or split[0].startswith("-"):
        return "fit", split
    if split[0] not in STARTED_BY:
        raise UserError(f"options {' '.join(split)[:80]!r}: begin with an option, or with {', '.join(STARTED_BY)}")
    return split[0], split[1:]


def run(options: Namespace) -> None:
    sweep = read_plan(options.files, Sweep, options.folder)
    runs, models = sweep.runs(options.fit), sweep.made_models(options.fit)
    share = list(runs.values())[options.shard]
    if options.list:
        for job in (*models, *share):
            for words in (job.words, *job.after):
                print(shlex.join(["python", "-m", "simnpo_pl", *words]))
        return
    if options.figure:
        check_installed()
        if options.figure.suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"--figure {options.figure}: the ending must be .png, .pdf or .svg")
    for job in (*models, *runs.values()):
        if job.is_finished:
            job.check_options()
    failed = [] if options.table else work(sweep.path, share, models)
    write_tables(table(sweep, runs), options.out)
    if options.figure:
        draw(sweep, runs, options.figure)
        print(f"figure: {options.figure}")
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first: {failed[0]}")


def work(folder: Path, runs: Sequence[Job], models: Sequence[Job]) -> list[str]:
    """Make the models, or wait until another worker has, then the runs that nobody else makes; messages of failures.

    A model that fails ends the sweep.
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
            state = f"{time.monotonic() - began:.0f} s" if remaining else "finished before"
        except Taken:
            state = "another worker makes it"
        except RunFailed as error:
            failed.append(str(error))
            state = f"failed: {error}"
        print(f"run {count} of {len(runs)}, {job.folder.relative_to(folder)}: {state}", flush=True)
    return failed


def table(sweep: Sweep, jobs: Mapping[Key, Job]) -> str:
    """The table as Markdown: a row a method, mean and spread over the seeds of finished runs."""
    columns = COLUMNS[sweep.table]
    lines = [f"# {sweep.title}", ""]
    for split in sweep.splits:
        rows = [_cells(line, columns.values()) for line in _lines(jobs, split, columns.values())]
        if len(sweep.splits) > 1:
            lines += [f"## {split}", ""]
        lines += [markdown.table(["method", *columns, "seeds"], rows), ""]
        planned = [job for key, job in jobs.items() if key[0] == split]
        if unfinished := sum(not job.is_finished for job in planned):
            lines += [f"{unfinished} of {len(planned)} runs are not finished.", ""]
    legend = "Mean ± sample standard deviation over seeds; one number if they do not differ."
    if not BY_DEFINITION.keys().isdisjoint(columns.values()):
        legend += " Values that compare the retrained model with itself hold by definition."
    return "\n".join([*lines, f"{legend} {sweep.note}".strip(), ""])


def draw(sweep: Sweep, jobs: Mapping[Key, Job], file: Path) -> None:
    """A panel for each metric: methods on the x axis, a line for each split with the spread over seeds as bars."""
    columns = {title: name for title, name in COLUMNS[sweep.table].items() if name != "n"}
    lines = {plain(split): _lines(jobs, split, columns.values()) for split in sweep.splits}
    with panels(file, 1, len(columns), (2.6, 2.2)) as (figure, axes):
        for axis, (title, name) in zip(axes[0], columns.items(), strict=True):
            for index, (split, found) in enumerate(lines.items()):
                known = [(line, measured) for line in found if (measured := line.spread(name))]
                methods = {line.title: measured for line, measured in known if line.model == "final"}
                means, deviations = ([getattr(s, key) for s in methods.values()] for key in ("mean", "deviation"))
                axis.errorbar(list(methods), means, deviations, fmt=".-", color=color(index), capsize=2, label=split)
                for line, measured in known:
                    if line.model in STYLES:
                        axis.axhline(measured.mean, color=GREY, linewidth=0.8, linestyle=STYLES[line.model])
            axis.set_title(title)
        if len(lines) > 1:
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper")


class _Line(NamedTuple):
    """A row of the table: runs of one method, whose final, start or retrained model is meant."""

    title: str
    model: str
    runs: list[Run]

    def spread(self, name: str) -> Spread | None:
        return spread([value(run, self.model, name) for run in self.runs])


def _lines(jobs: Mapping[Key, Job], split: str, names: Collection[str]) -> list[_Line]:
    """Rows of a split, from its finished runs; start and retrained model have one for all methods that share it."""
    methods: dict[str, list[Run]] = {}
    for (part, method, _), job in jobs.items():
        if part == split and job.is_finished:
            methods.setdefault(method, []).extend(read_runs([job.folder]))
    lines = []
    for title, model in (("Original", "start"), ("Retrain", "retrained")):
        alike: dict[str, list[_Line]] = {}
        for method, found in methods.items():
            line = _Line(method, model, [run for run in found if run.metrics(model)])
            if line.runs:
                alike.setdefault(str(_cells(line, names)[1:-1]), []).append(line)
        for same in alike.values():
            shared = title if len(alike) == 1 else f"{title}, {', '.join(line.title for line in same)}"
            lines.append(max(same, key=lambda line: len(line.runs))._replace(title=shared))
    return [*lines, *(_Line(name, "final", found) for name, found in methods.items())]


def _cells(line: _Line, names: Collection[str]) -> list[str]:
    cells = []
    for name in names:
        found = line.spread(name)
        cells.append("-" if found is None else str(found) if found.deviation else number(found.mean) + found.known)
    return [line.title, *cells, str(len({run.record["seed"] for run in line.runs}))]


def value(run: Run, model: str, name: str) -> float | None:
    """What a column shows of a finished run's `start`, `retrained` or `final` model.

    `name` is a metric, `n` for the rows behind it, `lm_eval TASK` for an accuracy, `forget_quality strong` or `weak`
    for the half of the forget rows that the start model saw or did not see, or `1 - ` before one of these.
    """
    if name.startswith("1 - "):
        found = value(run, model, name.removeprefix("1 - "))
        return None if found is None else 1 - found
    if model == "retrained" and name in BY_DEFINITION:
        return BY_DEFINITION[name]
    kind, _, which = name.partition(" ")
    if kind == "lm_eval":
        return run.record.get("lm_eval", {}).get(model, {}).get(which, {}).get("acc")
    if which:
        return _quality_of_half(run.rows if model == "final" else run.start_rows, run, which)
    return run.forget_rows if name == "n" else run.metrics(model).get(name)


def _quality_of_half(rows: Sequence[Row], run: Run, half: str) -> float | None:
    count = sum(row["split"] == "forget" for row in rows)
    if not count or not run.retrained_rows:
        return None
    return qualities(rows, run.retrained_rows, {half: by_order(count)[half]})[0].quality.p_value
