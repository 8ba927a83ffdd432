"""The page: one HTML file that needs no network and can be read on a phone."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.report import words
from simnpo_pl.report.figures import color, figures
from simnpo_pl.runs.record import Row, Run

TEMPLATES = Path(__file__).parent / "templates"


def html(runs: Sequence[Run]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    # Generated text stays text: the engine escapes it, and the script sets it as text.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # Runs keep their order.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.get_template("report.html").render(
        runs=[(run, color(index)) for index, run in enumerate(runs)],
        columns=[title_of(name) for name in words.measured(runs)],
        words=words,
        number=number,
        shlex=shlex,
        figures=figures(runs),
        data={"table": _table(runs), "rows": {run.name: _rows(run) for run in runs if run.rows}},
        plotly=get_plotlyjs(),
    )


def _table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every metric of every model, for the download."""
    return [
        {
            **{"run": run.name, "method": run.method, "settings": words.settings(run), "split": run.forget_split},
            **{"n": run.forget_rows, "seconds": run.seconds.get("total"), "memory_gib": run.memory, "model": model},
            **metrics,
        }
        for run in runs
        for model, metrics in run.models.items()
    ]


def _rows(run: Run) -> list[Row]:
    """Texts and numbers of the rows before and after, for the row browser."""
    before = {(row["split"], row["index"]): row for row in run.start_rows}
    shown = []
    for row in run.rows:
        start = before.get((row["split"], row["index"]), {})
        kept = {key: row.get(key) for key in ("split", "index", "question", "answer")}
        was = {"said": start.get("generation"), "before": start.get("probability")}
        now = {"says": row.get("generation"), "now": row.get("probability"), "ratio": row.get("truth_ratio")}
        shown.append({**kept, **was, **now})
    return shown
