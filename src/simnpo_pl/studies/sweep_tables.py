"""A sweep's runs as the paper's table: a row a method, mean and spread over seeds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from simnpo_pl.report import words
from simnpo_pl.report.robustness import spread
from simnpo_pl.runs.record import Run, read_runs
from simnpo_pl.studies.halves import by_order, qualities
from simnpo_pl.utils import markdown


class Column(NamedTuple):
    """A column of a table.

    Args:
        title: Head of the column.
        value: What it shows of a run's model, which is `start`, `retrained` or `final`.
        itself: Value of the retrained model against itself, if that is known without measuring.
    """

    title: str
    value: Callable[[Run, str], float | None]
    itself: float | None = None


def metric(name: str, title: str, itself: float | None = None) -> Column:
    return Column(title, lambda run, model: run.metrics(model).get(name), itself)


def accuracy(task: str, title: str) -> Column:
    """Accuracy on a task of lm-evaluation-harness."""
    return Column(title, lambda run, model: run.record.get("lm_eval", {}).get(model, {}).get(task, {}).get("acc"))


def one_minus(column: Column) -> Column:
    def value(run: Run, model: str) -> float | None:
        found = column.value(run, model)
        return None if found is None else 1 - found

    return column._replace(value=value)


def half(name: str, title: str) -> Column:
    """Forget quality of the half of the forget rows that the start model saw (`strong`) or did not see (`weak`)."""

    def value(run: Run, model: str) -> float | None:
        rows = {"start": run.start_rows, "final": run.rows}.get(model, [])
        forget = sum(row["split"] == "forget" for row in rows)
        if not forget or not run.retrained_rows:
            return None
        (found,) = qualities(rows, run.retrained_rows, {name: by_order(forget)[name]})
        return found.quality.p_value

    return Column(title, value, 1.0)


UTILITY = metric("model_utility", "MU")
COUNT = Column("n", lambda run, model: run.forget_rows)
COLUMNS = {
    "tofu": [
        one_minus(metric("forget/rouge", "forget 1-R")),
        one_minus(metric("forget/probability", "1-P")),
        metric("forget/truth_ratio", "T"),
        metric("forget_quality", "FQ", 1.0),
        *(
            metric(f"{split}/{name}", f"{title} {short}" if short == "R" else short)
            for split, title in (("real_authors", "authors"), ("world_facts", "facts"), ("retain", "retain"))
            for name, short in (("rouge", "R"), ("probability", "P"), ("truth_ratio", "T"))
        ),
        UTILITY,
        COUNT,
    ],
    "halves": [half("strong", "FQ strongly memorised"), half("weak", "FQ weakly memorised"), UTILITY, COUNT],
    "muse": [
        metric("verbmem_forget", "VerbMem forget"),
        metric("knowmem_forget", "KnowMem forget"),
        metric("privleak", "PrivLeak", 0.0),
        metric("knowmem_retain", "KnowMem retain"),
    ],
    "wmdp_bio": [one_minus(accuracy("wmdp_bio", "1 - Bio acc.")), accuracy("mmlu", "MMLU acc.")],
}
"""Columns of each kind of table."""
Key = tuple[str, str, int]
"""Split, method and seed of a run."""


def table(title: str, kind: str, planned: Sequence[Key], finished: Mapping[Key, Path], note: str = "") -> str:
    """The table as Markdown; `kind` is a key of `COLUMNS`, `finished` has the folders of finished runs."""
    columns, splits = COLUMNS[kind], list(dict.fromkeys(split for split, _, _ in planned))
    lines = [f"# {title}", ""]
    for split in splits:
        runs: dict[str, list[Run]] = {}
        for (of_split, method, _), folder in finished.items():
            if of_split == split:
                runs.setdefault(method, []).extend(read_runs([folder]))
        every = [run for found in runs.values() for run in found]
        rows = []
        for name, model in (("Original", "start"), ("Retrain", "retrained")):
            measured = [run for run in every if run.metrics(model)]
            if measured:
                rows.append(_row(name, measured, columns, model))
        rows += [_row(method, found, columns, "final") for method, found in runs.items()]
        if len(splits) > 1:
            lines += [f"## {split}", ""]
        lines += [markdown.table(["method", *(column.title for column in columns), "seeds"], rows), ""]
        count = sum(of_split == split for of_split, _, _ in planned)
        if len(every) < count:
            lines += [f"{count - len(every)} of {count} runs are not finished.", ""]
    legend = ["Mean ± sample standard deviation over seeds; one number if they do not differ."]
    if any(column.itself is not None for column in columns):
        legend.append("What compares the retrained model with itself is so by definition.")
    return "\n".join([*lines, " ".join([*legend, note]).strip(), ""])


def _row(title: str, runs: Sequence[Run], columns: Sequence[Column], model: str) -> list[str]:
    cells = []
    for column in columns:
        values = [column.value(run, model) for run in runs]
        if model == "retrained" and column.itself is not None:
            values = [column.itself]
        found = spread(values)
        cells.append("-" if found is None else words.number(found.mean) if found.deviation == 0 else str(found))
    return [title, *cells, str(len({run.record["seed"] for run in runs}))]
