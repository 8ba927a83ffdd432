"""Forget quality on two halves of the forget rows: the shortest and the longest, or the first and the second."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from simnpo_pl.metrics.titles import number
from simnpo_pl.report.drawing import legend_outside, log_labels, panels
from simnpo_pl.report.figures import GREY, color, largest_gap
from simnpo_pl.runs.record import Row, Run
from simnpo_pl.utils import markdown
from simnpo_pl.utils.errors import UserError


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


def qualities(
    rows: Sequence[Row], retrained: Sequence[Row], subsets: Mapping[str, Sequence[int]]
) -> list[ForgetSubset]:
    """Forget quality on subsets of the forget rows, of a model's rows as in `rows.jsonl` and the retrained model's."""
    import torch

    from simnpo_pl.metrics.functional import forget_quality

    ours, theirs = ({row["index"]: row for row in side if row["split"] == "forget"} for side in (rows, retrained))
    found = []
    for name, indices in subsets.items():
        for side, model in ((ours, "the model"), (theirs, "the retrained model")):
            missing = [index for index in indices if side.get(index, {}).get("truth_ratio") is None]
            if missing:
                raise UserError(
                    f"forget quality of halves: {model} has no truth ratio of forget row {missing[0]}; evaluate the "
                    "rows that were trained on, with --eval.retrained or --eval.retain_log"
                )
        ratios, others = ([float(side[index]["truth_ratio"]) for index in indices] for side in (ours, theirs))
        quality = forget_quality(torch.tensor(ratios), torch.tensor(others))
        probability = fmean(math.exp(-ours[index]["answer_nll"]) for index in indices)
        found.append(ForgetSubset(name, ratios, others, quality, probability))
    return found


def table(found: dict[str, list[ForgetSubset]]) -> str:
    heads, rows = ["model"], []
    for half in next(iter(found.values())):
        heads += [f"{half.name} half: n", "forget quality", "KS", "forget prob."]
    for model, halves in found.items():
        quality = [
            (half.quality.n, half.quality.p_value, half.quality.ks_statistic, half.probability) for half in halves
        ]
        rows.append([model, *(number(value) for values in quality for value in values)])
    return markdown.table(heads, rows)


def draw(found: dict[str, list[ForgetSubset]], file: Path) -> None:
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
