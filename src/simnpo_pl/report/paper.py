"""The report for papers: Markdown with figures as PNG, and LaTeX rows."""

from collections.abc import Sequence
from pathlib import Path

from simnpo_pl.metrics import titles
from simnpo_pl.report import robustness, words
from simnpo_pl.report.drawing import draw, panels
from simnpo_pl.report.figures import figures
from simnpo_pl.runs.record import Run
from simnpo_pl.utils.markdown import cell

LATEX = str.maketrans({c: rf"\{c}" for c in "&%$#_{}"})
LATEX |= str.maketrans({"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})
PNG = {"trade-off": "trade_off", "truth-ratios": "truth_ratios", "relearn-probability": "relearning"}
"""Figure of the page to the name of its PNG file."""
ATTACKS = {
    "relearned": robustness.relearning_table,
    "quantized": robustness.quantized_table,
    "sampled": robustness.leak_table,
}
"""Attribute of a run to the table that shows it."""


def markdown(runs: Sequence[Run], file: Path) -> str:
    """Summaries, table, figures, which are drawn into a folder next to the file, and tables of attacks."""
    rows = [
        ([run.name, words.model_name(run, model), titles.number(run.forget_rows)], metrics)
        for run in runs
        for model, metrics in run.models.items()
    ]
    lines = ["# Unlearning report", ""]
    lines += [f"* **{run.name}**: {cell(words.summary(run))}" for run in runs]
    lines += ["", titles.table(["run", "model", "n"], rows, words.measured(runs))]
    for figure in figures(runs):
        if figure["id"] in PNG:
            image = f"{file.stem}_figures/{PNG[figure['id']]}.png"
            with panels(file.parent / image, 1, 1, (5.2, 3.6)) as (_, axes):
                draw(axes[0][0], **figure["figure"])
            lines += ["", f"![{figure['title']}]({image})"]
    for kind, table in ATTACKS.items():
        if any(getattr(run, kind) for run in runs):
            lines += ["", table(runs)]
    versions = {name: version for run in runs for name, version in run.record["versions"].items()}
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    return "\n".join(lines) + "\n"


def latex(runs: Sequence[Run]) -> str:
    """Rows for a `tabular`, the columns named in a comment."""
    names = words.measured(runs)
    lines = ["% " + " & ".join(["run", "model", *(titles.title_of(name).short for name in names)])]
    for run in runs:
        for model, metrics in run.models.items():
            cells = [run.name, words.model_name(run, model), *(titles.number(metrics.get(name)) for name in names)]
            lines.append(" & ".join(text.translate(LATEX) for text in cells) + r" \\")
    return "\n".join(lines) + "\n"
