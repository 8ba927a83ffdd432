"""The page: one HTML file that needs no network and can be read on a phone."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.report import words
from simnpo_pl.report.drawing import inline
from simnpo_pl.report.figures import color, drawn
from simnpo_pl.runs.record import Row, Run

TEMPLATES = Path(__file__).parent / "templates"


def html(runs: Sequence[Run], columns: Sequence[str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Generated text stays text: the engine escapes it, and the script sets it as text.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # Runs keep their order.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.get_template("report.html").render(
        runs=[(run, color(index)) for index, run in enumerate(runs)],
        columns=[title_of(name) for name in columns],
        words=words,
        number=number,
        shlex=shlex,
        not_measured=words.not_measured(runs),
        figures=[(figure, inline(content)) for figure, content in drawn(runs, "svg")],
        data={"table": _table(runs), "rows": {run.name: _rows(run) for run in runs if run.rows}},
    )


def _table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every metric of every model, for the download."""
    return [
        {
            **{"run": run.name, "method": run.method, "settings": run.settings, "split": run.forget_split},
            **{"n": run.forget_rows, "seconds": run.seconds.get("total"), "memory_gib": run.memory, "model": model},
            **metrics,
        }
        for run in runs
        for model, metrics in run.models.items()
    ]


def _rows(run: Run) -> list[Row]:
    """Texts and numbers of the rows of all three models, for the row browser."""
    start, retrained = (
        {(row["split"], row["index"]): row for row in rows} for rows in (run.start_rows, run.retrained_rows)
    )
    shown = []
    for row in run.rows:
        key = (row["split"], row["index"])
        before, unseen = start.get(key, {}), retrained.get(key, {})
        kept = {name: row.get(name) for name in ("split", "index", "question", "answer")}
        said = {"said": before.get("generation"), "unseen": unseen.get("generation"), "says": row.get("generation")}
        numbers = {"before": before.get("probability"), "now": row.get("probability"), "ratio": row.get("truth_ratio")}
        shown.append({**kept, **said, **numbers})
    return shown
