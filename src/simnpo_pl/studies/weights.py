"""Gradient weights over finished runs: against answer length, forget probability and difficulty, by epoch.

After figures 2 and 3 of the SimNPO paper; with forget quality on the shortest and the longest half of the forget rows
if the runs were compared with a retrained model. `report` draws the weights by epoch.
"""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from simnpo_pl.metrics import titles
from simnpo_pl.metrics.titles import number
from simnpo_pl.report.drawing import check_installed, legend_outside, log_labels, panels
from simnpo_pl.report.figures import GREY, color, largest_gap
from simnpo_pl.runs.record import Row, Run, geometric_ratio, read_runs
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError

SAME_LOSS = 0.02
"""Largest difference in nats per token between two passes of one model, also in half precision."""
DOTS: dict[str, Any] = {"s": 9, "alpha": 0.55, "linewidths": 0}


def run(options: Namespace) -> None:
    check_installed()
    runs, epochs = read_runs(options.runs), options.epochs
    length, knowledge, by_halves = (options.out / f"weights_{name}.png" for name in ("length", "knowledge", "halves"))
    parts, files = [table(runs, epochs)], [length, knowledge]
    _draw_length(runs, epochs, length)
    _draw_knowledge(runs, epochs, knowledge)
    if evaluated := [run for run in runs if len(run.epochs) > 1]:
        parts.append(_quality_table(evaluated, epochs))
    if compared := [run for run in runs if run.rows and run.retrained_rows]:
        found = {run.name: qualities(run.rows, run.retrained_rows, by_length(run)) for run in compared}
        parts.append(halves_table(found))
        _draw_halves(found, by_halves)
        files.append(by_halves)
    print("\n\n".join([*parts, *(f"figure: {file}" for file in files)]))


def pearson(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Pearson's r and the p-value of no correlation; NaN if one side does not vary."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan, math.nan
    from scipy.stats import pearsonr

    result = pearsonr(x, y)
    return float(result.statistic), float(result.pvalue)


def chosen_epochs(run: Run, epochs: Sequence[int]) -> dict[int, list[Row]]:
    """Rows of `weights.jsonl` in those of `epochs` that the run has, or in its last epoch if it has none of them."""
    if not run.weights:
        raise UserError(
            f"{run.folder} holds no gradient weights; give a run of fit whose objective reads whole forget answers, "
            "such as SimNPO, NPO, DPO or GradDiff"
        )
    rows = sorted(run.weights, key=lambda row: row["index"])
    known = {row["epoch"] for row in rows}
    chosen = [epoch for epoch in epochs if epoch in known] or [max(known)]
    return {epoch: [row for row in rows if row["epoch"] == epoch] for epoch in chosen}


def difficulty(run: Run) -> dict[int, float] | None:
    """Row index to the start model's loss, nats per token; low if it memorized the row.

    None if it was not evaluated on the rows that the run trained on, which the losses of the first optimizer step show.
    """
    known = {row["index"]: row["answer_nll"] for row in run.start_rows if row["split"] == "forget"}
    rows = [row for row in run.weights if row["epoch"] == 1]
    if not rows or any(known.get(row["index"]) is None for row in rows):
        return None
    first = [row for row in rows if row["step"] == 1]
    same = all(abs(-row["logp"] / row["length"] - known[row["index"]]) < SAME_LOSS for row in first)
    return {row["index"]: known[row["index"]] for row in rows} if first and same else None


def table(runs: Sequence[Run], epochs: Sequence[int]) -> str:
    """Gradient weights of each run in some epochs, with their correlations."""
    lines = []
    for run in runs:
        for epoch, rows in chosen_epochs(run, epochs).items():
            weights, lengths, *known = _columns(run, rows)
            spread = f"{number(fmean(weights))} ({number(min(weights))} to {number(max(weights))})"
            found = [pearson(values, weights) if values else (math.nan, math.nan) for values in (lengths, *known)]
            shown = ["-" if math.isnan(r) else f"{r:.2f} (p {number(p)})" for r, p in found]
            lines.append([run.name, str(epoch), str(len(rows)), spread, *shown])
    heads = ["run", "epoch", "n", "weight: mean (least to most)"]
    return markdown.table([*heads, "r, answer length", "r, forget prob.", "r, difficulty"], lines)


def _columns(run: Run, rows: Sequence[Row]) -> tuple[list[float], ...]:
    """Weight, answer length, forget probability and difficulty of rows; the last is empty if it is not known."""
    hard = difficulty(run) or {}
    columns = [[row[name] for row in rows] for name in ("weight", "length", "probability")]
    return (*columns, [hard[row["index"]] for row in rows] if hard else [])


def _quality_table(runs: Sequence[Run], epochs: Sequence[int]) -> str:
    names = ("model_utility", "forget_quality")
    rows = [
        ([run.name, str(epoch)], metrics)
        for run in runs
        for epoch, metrics in ((0, run.metrics("start")), *run.epochs)
        if epoch in (0, *epochs) and titles.measured([metrics], names)
    ]
    return titles.table(["run", "epoch"], rows, names)


def _label_row(axis: Any, run: Run) -> None:
    axis.set_ylim(0, 1.06 * max(row["weight"] for row in run.weights))
    axis.set_ylabel(f"{run.name}\ngradient weight")


def _draw_length(runs: Sequence[Run], epochs: Sequence[int], file: Path) -> None:
    """Weight of every forget row against its answer's length, a row of panels per run (figure 3)."""
    chosen = [chosen_epochs(run, epochs) for run in runs]
    with panels(file, len(runs), max(map(len, chosen)), (1.9, 1.8), sharex=True, sharey="row") as (figure, axes):
        for index, run in enumerate(runs):
            for axis in axes[index][len(chosen[index]) :]:
                axis.set_axis_off()
            for axis, (epoch, rows) in zip(axes[index], chosen[index].items(), strict=False):
                weights, lengths, *_ = _columns(run, rows)
                axis.scatter(lengths, weights, color=color(index), **DOTS)
                axis.set_title(f"epoch {epoch}: r = {pearson(lengths, weights)[0]:.2f}")
            _label_row(axes[index][0], run)
        figure.supxlabel("answer length n, tokens", fontsize=8)


def _draw_knowledge(runs: Sequence[Run], epochs: Sequence[int], file: Path) -> None:
    """Weight against the forget probability at that epoch, and against the start model's loss (difficulty)."""
    from matplotlib import colormaps

    with panels(file, len(runs), 2, (3.1, 2.0), sharex="col", sharey="row") as (_, axes):
        for run, row in zip(runs, axes, strict=True):
            chosen = chosen_epochs(run, epochs)
            for (epoch, rows), shade in zip(chosen.items(), np.linspace(0, 0.9, len(chosen)), strict=True):
                weights, _, *known = _columns(run, rows)
                for axis, values in zip(row, known, strict=True):
                    if values:
                        label = f"{epoch}: r = {pearson(values, weights)[0]:.2f}"
                        axis.scatter(values, weights, label=label, color=colormaps["viridis"](shade), **DOTS)
            _label_row(row[0], run)
            for axis in row:
                if axis.collections:
                    legend_outside(axis, "epoch")
                else:
                    axis.text(0.5, 0.5, "start model not measured", ha="center", transform=axis.transAxes)
        axes[-1][0].set_xlabel("forget probability at that epoch")
        axes[-1][1].set_xlabel("start model's loss, nats per token")


# -- forget quality on halves -------------------------------------------------------------------------------


class ForgetSubset(NamedTuple):
    """A part of the forget rows: truth ratios of both models, `forget_quality` of them, mean answer probability."""

    name: str
    unlearned: list[float]
    retrained: list[float]
    quality: Any
    probability: float


def by_length(run: Run) -> dict[str, list[int]]:
    """Row indices of the shortest and the longest answers, in scored tokens; equal ones by index.

    The evaluated model unlearned all rows; only the evaluation is halved (SimNPO paper, figure 2).
    """
    lengths = {row["index"]: row["length"] for row in run.weights if row["epoch"] == 1}
    if not lengths:
        raise UserError(f"{run.folder} holds no weights.jsonl, which has the answers' lengths: give a run of fit")
    order = sorted(lengths, key=lambda index: (lengths[index], index))
    half = len(order) // 2
    return {"shortest": sorted(order[:half]), "longest": sorted(order[half:])}


def by_order(rows: int) -> dict[str, list[int]]:
    """Row indices of the first half, which a start model has seen, and of the second, which it has not."""
    return {"strong": list(range(rows // 2)), "weak": list(range(rows // 2, rows))}


def qualities(rows: Sequence[Row], retrained: Sequence[Row], parts: Mapping[str, Sequence[int]]) -> list[ForgetSubset]:
    """Forget quality on subsets of the forget rows, of a model's rows as in `rows.jsonl` and the retrained model's."""
    import torch

    from simnpo_pl.metrics.functional import forget_quality

    ours = {row["index"]: row for row in rows if row["split"] == "forget"}
    known = [
        {row["index"]: geometric_ratio(row) for row in side if row["split"] == "forget"} for side in (rows, retrained)
    ]
    found = []
    for name, indices in parts.items():
        for side, model in zip(known, ("the model", "the retrained model"), strict=True):
            missing = [index for index in indices if side.get(index) is None]
            if missing:
                raise UserError(
                    f"forget quality of halves: {model} has no truth ratio of forget row {missing[0]}; evaluate the "
                    "rows that were trained on, with --eval.retrained or --eval.retain_log"
                )
        ratios, others = ([ratio for i in indices if (ratio := side[i]) is not None] for side in known)
        quality = forget_quality(torch.tensor(ratios), torch.tensor(others))
        probability = fmean(math.exp(-ours[index]["answer_nll"]) for index in indices)
        found.append(ForgetSubset(name, ratios, others, quality, probability))
    return found


def halves_table(found: dict[str, list[ForgetSubset]]) -> str:
    heads, rows = ["model"], []
    for half in next(iter(found.values())):
        heads += [f"{half.name} half: n", "forget quality", "KS", "forget prob."]
    for model, halves in found.items():
        quality = [(one.quality.n, one.quality.p_value, one.quality.ks_statistic, one.probability) for one in halves]
        rows.append([model, *(number(value) for values in quality for value in values)])
    return markdown.table(heads, rows)


def _draw_halves(found: dict[str, list[ForgetSubset]], file: Path) -> None:
    """Distribution of truth ratios on two halves (figure 2); dotted lines are the KS statistics, the largest gaps."""
    halves = list(zip(*found.values(), strict=True))
    with panels(file, 1, len(halves), (3.3, 2.2), sharex=True, sharey=True) as (_, axes):
        for axis, subsets in zip(axes[0], halves, strict=True):
            retrained = subsets[0].retrained
            axis.ecdf(retrained, color=GREY, linewidth=2, label="retrained")
            for index, (model, subset) in enumerate(zip(found, subsets, strict=True)):
                shade, label = color(index), f"{model}: {number(subset.quality.p_value)}"
                axis.ecdf(subset.unlearned, label=label, color=shade, linewidth=1.2)
                at, *shares = largest_gap(subset.unlearned, retrained)
                axis.plot([at, at], shares, color=shade, linewidth=0.8, linestyle=":")
            axis.set_xscale("log")
            log_labels(axis)
            axis.set_title(f"{subsets[0].name} half, n = {len(retrained)}")
            axis.set_xlabel("truth ratio R")
            legend_outside(axis, "forget quality")
        axes[0][0].set_ylabel("share of forget rows")
