"""The report as Markdown with figures as PNG, and figures as PDF."""

from collections.abc import Sequence
from pathlib import Path

from simnpo_pl.metrics import titles
from simnpo_pl.report import robustness, words
from simnpo_pl.report.figures import drawn
from simnpo_pl.runs.record import Run
from simnpo_pl.utils.files import writing
from simnpo_pl.utils.markdown import cell, table

SHOWN = ("trade_off", "truth_ratios", "relearning")
"""Figures that Markdown shows."""
ATTACKS = {
    "relearned": robustness.relearning_table,
    "quantized": robustness.quantized_table,
    "sampled": robustness.leak_table,
}
"""Attribute of a run to the table that shows it."""


def markdown(runs: Sequence[Run], columns: Sequence[str], file: Path) -> str:
    """Summaries, table, figures, which are drawn into a folder next to the file, and tables of attacks."""
    rows = [
        ([run.name, words.model_name(run, model), titles.number(run.forget_rows)], metrics)
        for run in runs
        for model, metrics in run.models.items()
    ]
    lines = ["# Unlearning report", ""]
    lines += [f"* **{run.name}**: {cell(words.summary(run))}" for run in runs]
    lines += ["", titles.table(["run", "model", "n"], rows, columns)]
    lines += [*_intervals(runs, columns), "", words.TRUST]
    for figure, content in drawn(runs, "png"):
        if figure.id in SHOWN:
            image = f"{file.stem}_figures/{figure.id}.png"
            with writing(file.parent / image) as handle:
                handle.write(content)
            lines += ["", f"![{figure.title}]({image})"]
    for kind, shown in ATTACKS.items():
        if any(getattr(run, kind) for run in runs):
            lines += ["", shown(runs)]
    if missing := words.not_measured(runs):
        lines += ["", "Not measured:", "", *(f"* {cell(line)}" for line in missing)]
    versions = {name: version for run in runs for name, version in run.record["versions"].items()}
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    return "\n".join(lines) + "\n"


def _intervals(runs: Sequence[Run], columns: Sequence[str]) -> list[str]:
    models = [(run, model) for run in runs for model in run.models]
    names = [name for name in columns if any(name in run.intervals(model) for run, model in models)]
    rows = [
        [run.name, words.model_name(run, model), *(words.interval(run, model, name) or "-" for name in names)]
        for run, model in models
        if run.intervals(model)
    ]
    heads = ["run", "model", *(titles.title_of(name).short for name in names)]
    return ["", "95 % intervals of means over rows, by bootstrap:", "", table(heads, rows)] if rows else []


def figures(runs: Sequence[Run], folder: Path) -> None:
    """Every figure as a PDF file of this folder."""
    for figure, content in drawn(runs, "pdf"):
        with writing(folder / f"{figure.id}.pdf") as handle:
            handle.write(content)
