"""The Markov-chain study as a table and as the trade-off figure."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.report.palette import GREY, colour
from simnpo_pl.studies.analysis.markov import LENGTHS, LEVELS, METHODS, Curve, at_level, floors
from simnpo_pl.utils import markdown

FORGET = ("forget1", "forget2")
RANGE = 0.3
"""Retain distances drawn, nats."""


def table(results: Sequence[dict[str, Any]]) -> str:
    """Forget distances at two retain distances, mean and deviation over seeds, and seeds won by SimNPO, as Markdown.

    A seed is won at the larger retain distance against the best other method.
    """
    seeds = sorted({result["seed"] for result in results})
    lines = [
        f"KL(true chain || model) in nats where the retain distance is {LEVELS[0]} and {LEVELS[1]}; {len(seeds)} seeds."
    ]
    for length in LENGTHS:
        group = [result for result in results if result["length"] == length]
        lines += [
            "",
            f"forget2 of length {length}, {'seen' if length < max(LENGTHS) else 'not seen'} by the start model:",
            "",
        ]
        heads = [f"{name} @{level:.2f}" for name in FORGET for level in LEVELS]
        rows = []
        for method in METHODS:
            cells = []
            for name in FORGET:
                for level in LEVELS:
                    found = [at_level(result["methods"][method], level) for result in group]
                    cells.append(_spread([values[name] for values in found if values]))
            rows.append([method, *cells])
        lines.append(markdown.table(["method", *heads], rows))
        for model in ("start", "retrained"):
            shown = [_spread([result[model][name] for result in group]) for name in ("retain", *FORGET)]
            lines += ["", f"{model}: retain {shown[0]}, forget1 {shown[1]}, forget2 {shown[2]}"]
        floor = floors(length)
        lines += ["", "Bayes floors of the start model: " + ", ".join(f"{k} {v:.4f}" for k, v in floor.items())]
        for name in FORGET:
            lines += [
                "",
                f"SimNPO has the larger {name} distance at {LEVELS[1]:.2f} than GA and both NPO {_won(group, name)}",
            ]
    return "\n".join(lines)


def _won(group: Sequence[dict[str, Any]], name: str) -> str:
    ours = next(method for method in METHODS if method.startswith("SimNPO"))
    others = [method for method in METHODS if method in ("GA",) or method.startswith("NPO, ")]
    won = compared = 0
    for result in group:
        mine = at_level(result["methods"][ours], LEVELS[1])
        theirs = [found for method in others if (found := at_level(result["methods"][method], LEVELS[1]))]
        if mine and theirs:
            compared += 1
            won += mine[name] > max(found[name] for found in theirs)
    return f"on {won} of {compared} seeds."


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return (
        f"{statistics.fmean(values):.2f} ± {deviation:.2f}" if max(values) >= 0.1 else f"{statistics.fmean(values):.3f}"
    )


def figure(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Forget distance against retain distance, a row of panels for each length of forget2, seeds as bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sheet, panels = plt.subplots(len(LENGTHS), 2, figsize=(9, 7), dpi=160, layout="constrained", sharex=True)
    for row, length in zip(panels, LENGTHS, strict=True):
        group = [result for result in results if result["length"] == length]
        floor = floors(length)
        for axes, name in zip(row, FORGET, strict=True):
            for number, method in enumerate(METHODS):
                _draw(axes, [result["methods"][method] for result in group], name, method, colour(number))
            for model, marker in (("start", "s"), ("retrained", "*")):
                points = [(result[model]["retain"], result[model][name]) for result in group]
                style = {"color": GREY, "edgecolor": "black", "linewidth": 0.5, "zorder": 4}
                axes.scatter(*zip(*points, strict=True), marker=marker, s=60, label=f"{model} model", **style)
            axes.plot(
                floor["retain"], floor[name], "x", color="black", label="Bayes floor of the start model", zorder=5
            )
            seen = "seen" if length < max(LENGTHS) else "not seen"
            which = f"forget2, {seen} by the start model" if name == "forget2" else "forget1"
            axes.set_title(f"{which} (forget2 of length {length})", fontsize=9)
            axes.set_xlim(0, RANGE)
            axes.set_ylim(0, 1.5)
            axes.grid(alpha=0.25)
            axes.set_ylabel("forget distance, nats")
    for axes in panels[-1]:
        axes.set_xlabel("retain distance, nats")
    handles, labels = panels[0][0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.savefig(file)
    plt.close(sheet)


def _draw(axes: Any, curves: Sequence[Curve], name: str, label: str, shade: str) -> None:
    """Mean over seeds with the range of the seeds as a band, over the retain distances that every seed reaches."""
    import numpy as np

    if not curves:
        return
    first = max(curve[0]["retain"] for curve in curves)
    last = min(RANGE, *(max(point["retain"] for point in curve) for curve in curves))
    if last <= first:
        return
    grid = np.linspace(first, last, 60)
    values = np.array([[_value(curve, level, name) for level in grid] for curve in curves])
    axes.plot(grid, values.mean(axis=0), color=shade, label=label, linewidth=1.6)
    axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.12, linewidth=0)


def _value(curve: Curve, level: float, name: str) -> float:
    found = at_level(curve, level)
    return curve[0][name] if found is None else found[name]
