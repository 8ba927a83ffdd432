"""Report over runs: a page to read offline (.html), Markdown with figures (.md), LaTeX (.tex), or figures as PDF."""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from simnpo_pl.metrics import titles
from simnpo_pl.report import latex, robustness, words
from simnpo_pl.report.drawing import check_installed, inline
from simnpo_pl.report.figures import color, drawn
from simnpo_pl.runs.record import Row, Run, read_runs
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_text, writing
from simnpo_pl.utils.markdown import cell, table

SHOWN = ("trade_off", "truth_ratios", "relearning")
"""Figures that Markdown shows."""


def run(options: Namespace) -> None:
    runs = read_runs(options.runs, options.label)
    out = options.out or [(runs[0].folder if len(runs) == 1 else Path()) / "report.html"]
    for file in out:
        if file.suffix not in (".html", ".md", ".tex", ""):
            raise UserError(
                f"--out {file}: the ending must be .html, .md or .tex; a name without an ending is a folder for figures"
            )
    if any(file.suffix != ".tex" for file in out):
        check_installed()
    columns = words.measured(runs, options.columns)
    for file in out:
        if file.suffix == "":
            for name, _, _, content in drawn(runs, "pdf"):
                _write(file / f"{name}.pdf", content)
        elif file.suffix == ".html":
            write_text(file, html(runs, columns))
        elif file.suffix == ".md":
            write_text(file, markdown(runs, columns, file))
        else:
            write_text(file, latex.tables(runs, columns))
        print(f"written: {file}")


def html(runs: Sequence[Run], columns: Sequence[str]) -> str:
    """One page that needs no network and can be read on a phone."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Generated text stays text: the engine escapes it, and the script sets it as text.
    environment = Environment(
        loader=PackageLoader("simnpo_pl.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # Runs keep their order.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment.get_template("report.html").render(
        runs=[(run, color(index)) for index, run in enumerate(runs)],
        columns=[titles.title_of(name) for name in columns],
        words=words,
        number=titles.number,
        shlex=shlex,
        not_measured=words.not_measured(runs),
        figures=[(*figure, inline(content)) for *figure, content in drawn(runs, "svg")],
        data={"table": _table(runs), "rows": {run.name: _rows(run) for run in runs if run.rows}},
    )


def _table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every metric of every model, for the download."""
    return [
        {
            **{"run": run.name, "method": run.method, "settings": run.settings, "split": run.forget_split},
            **{"n": run.forget_rows, "seconds": run.record["seconds"].get("total"), "memory_gib": run.memory},
            "model": model,
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


def markdown(runs: Sequence[Run], columns: Sequence[str], file: Path) -> str:
    """Summaries, tables, figures, which are drawn into a folder next to the file, and what was not measured."""
    models = [(run, model, [run.name, words.model_name(run, model)]) for run in runs for model in run.models]
    rows = [([*labels, titles.number(run.forget_rows)], run.metrics(model)) for run, model, labels in models]
    summaries = [f"* **{run.name}**: {cell(words.summary(run))}" for run in runs]
    parts = ["# Unlearning report", "\n".join(summaries), titles.table(["run", "model", "n"], rows, columns)]
    if names := [name for name in columns if any(name in run.intervals(model) for run, model, _ in models)]:
        intervals = [
            [*labels, *(words.interval(run, model, name) or "-" for name in names)]
            for run, model, labels in models
            if run.intervals(model)
        ]
        heads = ["run", "model", *(titles.title_of(name).short for name in names)]
        parts += ["95 % intervals of means over rows, by bootstrap:", table(heads, intervals)]
    parts.append(words.TRUST)
    for name, title, _, content in drawn(runs, "png"):
        if name in SHOWN:
            image = f"{file.stem}_figures/{name}.png"
            _write(file.parent / image, content)
            parts.append(f"![{title}]({quote(image)})")
    parts += [robustness.relearning_table(runs), robustness.quantized_table(runs), robustness.leak_table(runs)]
    if missing := words.not_measured(runs):
        parts += ["Not measured:", "\n".join(f"* {cell(line)}" for line in missing)]
    versions = {name: version for run in runs for name, version in run.record["versions"].items()}
    parts.append("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    return "\n\n".join(filter(None, parts)) + "\n"


def _write(file: Path, content: bytes) -> None:
    with writing(file) as handle:
        handle.write(content)
