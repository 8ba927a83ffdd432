"""The report for papers: Markdown with figures as PNG, and LaTeX rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.report import robustness, series, words
from simnpo_pl.report.palette import GREY, colour
from simnpo_pl.runs.record import Run
from simnpo_pl.utils.markdown import cell, table

LATEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "\\": r"\textbackslash{}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def markdown(runs: Sequence[Run], figures: Sequence[tuple[str, str]]) -> str:
    """The table, a summary of each run, and the figures.

    Args:
        runs: In the order they are shown.
        figures: Title and file, as seen from the Markdown file, of each figure.
    """
    columns = words.measured(runs)
    lines = ["# Unlearning report", ""]
    lines += [f"* **{run.name}**: {cell(words.summary(run))}" for run in runs]
    heads = ["run", "model", "n", *(column.title for column in columns)]
    cells = [
        [run.name, model, words.number(words.forget_rows(run)), *(words.number(metrics.get(c.key)) for c in columns)]
        for run, model, metrics in _models(runs)
    ]
    lines += ["", table(heads, cells)]
    for title, file in figures:
        lines += ["", f"![{title}]({file})"]
    for key, attack in (
        ("relearn", robustness.relearning_table),
        ("quantized", robustness.quantized_table),
        ("leak", robustness.leak_table),
    ):
        if any(run.record.get(key) for run in runs):
            lines += ["", attack(runs)]
    versions = {name: version for run in runs for name, version in run.record["versions"].items()}
    lines += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]
    return "\n".join(lines) + "\n"


def latex(runs: Sequence[Run]) -> str:
    """Rows for a `tabular`, the columns named in a comment."""
    columns = words.measured(runs)
    lines = ["% " + " & ".join(["run", "model", *(column.title for column in columns)])]
    for run, model, metrics in _models(runs):
        cells = [run.name, model, *(words.number(metrics.get(column.key)) for column in columns)]
        lines.append(" & ".join("".join(LATEX.get(c, c) for c in cell) for cell in cells) + r" \\")
    return "\n".join(lines) + "\n"


def png(runs: Sequence[Run], folder: Path) -> list[tuple[str, str]]:
    """Draw the figures.

    Args:
        runs: In the order they are shown.
        folder: Where to write.

    Returns:
        Title and file name of each.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []
    for name, title, draw in (
        ("trade_off", "Forget quality against model utility", _trade_off),
        ("truth_ratios", "Truth ratios on the forget rows", _truth_ratios),
        ("relearning", "Relearning attack", _relearning),
    ):
        figure, axes = plt.subplots(figsize=(5.2, 3.6), dpi=200, layout="constrained")
        if draw(axes, runs):
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7)
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png")
            drawn.append((title, f"{name}.png"))
        plt.close(figure)
    return drawn


def _trade_off(axes: Any, runs: Sequence[Run]) -> bool:
    any_path = False
    for number, run in enumerate(runs):
        points = series.path_of(run)
        if points:
            any_path = True
            x, y = [p.utility for p in points], [p.log10_p for p in points]
            axes.plot(x, y, ".-", color=colour(number), linewidth=1, markersize=4, label=run.name)
            axes.plot(x[-1], y[-1], "o", color=colour(number), markersize=8)
    for label, marker, of in (("start model", "s", series.start_of), ("retrained model", "*", series.retrained_of)):
        known = sorted({(p.utility, p.log10_p) for run in runs if (p := of(run)) is not None})
        if known:
            axes.scatter(*zip(*known, strict=True), marker=marker, s=70, color=GREY, label=label, zorder=3)
    axes.axhline(-1.30103, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xlabel("model utility")
    axes.set_ylabel("log10 forget quality")
    return any_path


def _truth_ratios(axes: Any, runs: Sequence[Run]) -> bool:
    drawn: set[tuple[float, ...]] = set()

    def step(values: list[float], label: str, **style: Any) -> None:
        if values and tuple(values) not in drawn:
            drawn.add(tuple(values))
            axes.step(*series.distribution(values), where="post", label=label, **style)

    for number, run in enumerate(runs):
        ours, retrained = series.truth_ratios(run.rows), series.truth_ratios(run.retrained_rows)
        step(ours, run.name, color=colour(number), linewidth=1.5)
        step(series.truth_ratios(run.start_rows), "start model", color=GREY, linewidth=1, linestyle=":")
        step(retrained, "retrained model", color=GREY, linewidth=2)
        if ours and retrained:
            gap = series.largest_gap(ours, retrained)
            axes.plot([gap.at, gap.at], [gap.low, gap.high], color=colour(number), linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("truth ratio R")
    axes.set_ylabel("share of forget rows")
    return bool(drawn)


def _relearning(axes: Any, runs: Sequence[Run]) -> bool:
    curves = robustness.relearning(runs)
    for curve in curves:
        known = [(e, v) for e, v in zip(curve.epochs, curve.values["forget/probability"], strict=True) if v is not None]
        settings = curve.settings
        axes.errorbar(
            [epoch for epoch, _ in known],
            [value.mean for _, value in known],
            [value.deviation for _, value in known],
            color=colour(runs.index(curve.run)),
            linestyle="-" if settings["subset"] == "shortest" else ":",
            capsize=2,
            label=f"{curve.run.name}, {curve.rows} {settings['subset']} rows, lr {settings['lr']:g}",
        )
    axes.set_xlabel("epoch of relearning")
    axes.set_ylabel("forget probability")
    return bool(curves)


def _models(runs: Sequence[Run]) -> list[tuple[Run, str, dict[str, float]]]:
    names = {"final": "unlearned", "start": "start", "retrained": "retrained"}
    return [(run, names[model], run.metrics(model)) for run in runs for model in names if run.metrics(model)]
