"""The page: one HTML file that asks the network for nothing and can be read on a phone."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.report import words
from simnpo_pl.runs.record import Row, Run

TEMPLATES = Path(__file__).parent / "templates"


def html(runs: Sequence[Run]) -> str:
    """The whole page.

    Args:
        runs: In the order they are shown.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    from simnpo_pl.report.figures import figures
    from simnpo_pl.report.palette import colour

    # Whatever a model generated is text here: the engine escapes it, and the script sets it as text.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # Runs stay in the order they were named.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.get_template("report.html").render(
        runs=[{**_run(run), "colour": colour(number)} for number, run in enumerate(runs)],
        columns=words.measured(runs),
        number=words.number,
        figures=figures(runs),
        data={"table": _table(runs), "rows": {run.name: _rows(run) for run in runs if run.rows}},
        plotly=get_plotlyjs(),
    )


def _run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "summary": words.summary(run),
        "command": shlex.join(map(str, run.record.get("command", []))),
        "config": run.config,
        "versions": run.record["versions"],
        "seed": run.record.get("seed"),
        "cells": {model: run.metrics(model) for model in ("final", "start", "retrained") if run.metrics(model)},
        "method": words.method(run),
        "settings": words.settings(run),
        "split": words.split(run),
        "n": words.forget_rows(run),
        "seconds": words.seconds(run),
        "memory": words.memory(run),
        "seconds_by_phase": run.record.get("seconds", {}),
    }


def _table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every metric of every model, for the download."""
    lines = []
    for run in runs:
        fixed = {
            "run": run.name,
            "method": words.method(run),
            "settings": words.settings(run),
            "split": words.split(run),
            "n": words.forget_rows(run),
            "seconds": words.seconds(run),
            "memory_gib": words.memory(run),
        }
        for model in ("final", "start", "retrained"):
            if run.metrics(model):
                lines.append({**fixed, "model": model, **run.metrics(model)})
    return lines


def _rows(run: Run) -> list[Row]:
    """What the row browser shows: a row's texts and numbers before and after."""
    before = {(row["split"], row["index"]): row for row in run.start_rows}
    shown = []
    for row in run.rows:
        start = before.get((row["split"], row["index"]), {})
        shown.append(
            {
                "split": row["split"],
                "index": row["index"],
                "question": row.get("question"),
                "answer": row.get("answer"),
                "said": start.get("generation"),
                "says": row.get("generation"),
                "before": start.get("probability"),
                "now": row.get("probability"),
                "ratio": row.get("truth_ratio"),
            }
        )
    return shown
