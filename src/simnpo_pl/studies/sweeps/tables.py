"""A sweep's runs as the paper's table: a row a method, mean and spread over seeds."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from simnpo_pl.report import words
from simnpo_pl.report.robustness import spread
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.analysis.halves import by_order, qualities
from simnpo_pl.studies.launch import read_record
from simnpo_pl.studies.sweeps.plan import Planned, Sweep
from simnpo_pl.utils import markdown

Value = Callable[[Run, str], float | None]
"""Of a run and one of its models, `start`, `retrained` or `final`."""


class Column(NamedTuple):
    """A column of a table.

    Args:
        title: Head of the column.
        value: What it shows.
        itself: What the retrained model scores against itself, where that is known without measuring.
    """

    title: str
    value: Value
    itself: float | None = None


def metric(name: str, itself: float | None = None, title: str = "") -> Column:
    """A metric of the evaluation; `1 - NAME` is one minus it."""
    key = name.removeprefix("1 - ")

    def value(run: Run, model: str) -> float | None:
        found = run.metrics(model).get(key)
        return None if found is None else 1 - found if key != name else found

    return Column(title or name, value, itself)


def accuracy(task: str, title: str, wrong: bool = False) -> Column:
    """Accuracy on a task of lm-evaluation-harness, or with `wrong` one minus it."""

    def value(run: Run, model: str) -> float | None:
        found = run.record.get("lm_eval", {}).get(model, {}).get(task, {}).get("acc")
        return None if found is None else 1 - found if wrong else found

    return Column(title, value)


def half(name: str, title: str) -> Column:
    """Forget quality of the half of the forget rows that the start model saw (`strong`) or did not (`weak`)."""

    def value(run: Run, model: str) -> float | None:
        rows = {"start": run.start_rows, "final": run.rows}.get(model, [])
        forget = sum(row["split"] == "forget" for row in rows)
        if not forget or not run.retrained_rows:
            return None
        (found,) = qualities(rows, run.retrained_rows, {name: by_order(forget)[name]})
        return found.quality.p_value

    return Column(title, value, 1.0)


def _count(run: Run, model: str) -> float | None:
    found = words.forget_rows(run)
    return None if found is None else float(found)


TOFU = [
    metric("1 - forget/rouge", title="forget 1-R"),
    metric("1 - forget/probability", title="1-P"),
    metric("forget/truth_ratio", title="T"),
    metric("forget_quality", 1.0, "FQ"),
    *(
        metric(f"{split}/{name}", title=f"{title} {short}" if short == "R" else short)
        for split, title in (("real_authors", "authors"), ("world_facts", "facts"), ("retain", "retain"))
        for name, short in (("rouge", "R"), ("probability", "P"), ("truth_ratio", "T"))
    ),
    metric("model_utility", title="MU"),
    Column("n", _count),
]
MUSE = [
    metric("verbmem_forget", title="VerbMem forget"),
    metric("knowmem_forget", title="KnowMem forget"),
    metric("privleak", 0.0, "PrivLeak"),
    metric("knowmem_retain", title="KnowMem retain"),
]
WMDP_BIO = [accuracy("wmdp_bio", "1 - Bio acc.", wrong=True), accuracy("mmlu", "MMLU acc.")]
HALVES = [
    half("strong", "FQ strongly memorised"),
    half("weak", "FQ weakly memorised"),
    metric("model_utility", title="MU"),
    Column("n", _count),
]
COLUMNS = {"tofu": TOFU, "halves": HALVES, "muse": MUSE, "wmdp_bio": WMDP_BIO}
"""Columns of each kind of table."""


def table(sweep: Sweep, planned: Sequence[Planned]) -> str:
    """The table as Markdown, of the runs that are finished.

    Args:
        sweep: What was to be run.
        planned: All its runs.
    """
    columns = COLUMNS[sweep.table]
    lines = [f"# {sweep.title}", ""]
    for split in sweep.splits:
        runs = {method: _finished(sweep, planned, split, method) for method in sweep.methods}
        every = [run for found in runs.values() for run in found]
        if len(sweep.splits) > 1:
            lines += [f"## {split}", ""]
        heads = ["method", *(column.title for column in columns), "seeds"]
        rows = []
        for title, model in (("Original", "start"), ("Retrain", "retrained")):
            having = [run for run in every if run.metrics(model)]
            if having:
                rows.append(_row(title, having, columns, model))
        rows += [_row(method, found, columns, "final") for method, found in runs.items() if found]
        lines.append(markdown.table(heads, rows))
        missing = sum(len(sweep.seeds) - len(found) for found in runs.values())
        if missing:
            lines += ["", f"{missing} of {len(sweep.seeds) * len(sweep.methods)} runs are not finished."]
        lines.append("")
    lines += [_legend(sweep, planned), ""]
    return "\n".join(lines)


def _row(title: str, runs: Sequence[Run], columns: Sequence[Column], model: str) -> list[str]:
    cells = []
    for column in columns:
        values = [column.value(run, model) for run in runs]
        if model == "retrained" and column.itself is not None:
            values = [column.itself]
        found = spread(values)
        cells.append("-" if found is None else words.number(found.mean) if found.deviation == 0 else str(found))
    seeds = len({run.record["seed"] for run in runs})
    return [title, *cells, str(seeds)]


def _finished(sweep: Sweep, planned: Sequence[Planned], split: str, method: str) -> list[Run]:
    found = []
    for run in planned:
        if (run.split, run.method) == (split, method):
            folder = sweep.path / run.name
            record = read_record(folder)
            if record and record.get("finished"):
                found.append(Run(run.name, folder, record))
    return found


def _legend(sweep: Sweep, planned: Sequence[Planned]) -> str:
    said = ["Mean ± sample standard deviation over seeds; one number where they do not differ."]
    if any(column.itself is not None for column in COLUMNS[sweep.table]):
        said.append("What compares the retrained model with itself is so by definition.")
    if sweep.note:
        said.append(sweep.note)
    return " ".join(said)
