"""How the gradient weights of a run go with length, probability and difficulty of its forget rows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from simnpo_pl.runs.record import Row, Run
from simnpo_pl.utils.errors import UserError

SAME_LOSS = 0.02
"""Nats per token within which two passes of one model agree, in half precision too."""


class Correlation(NamedTuple):
    """Pearson's r over n rows, with the p-value of no correlation; NaN where one side does not vary."""

    r: float
    p: float
    n: int


class EpochSummary(NamedTuple):
    """Gradient weights of one epoch."""

    epoch: int
    mean: float
    low: float
    high: float
    with_length: Correlation
    with_probability: Correlation
    with_difficulty: Correlation | None


def pearson(x: Sequence[float], y: Sequence[float]) -> Correlation:
    """Pearson correlation of two samples of like length.

    Example:
        >>> pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).r
        1.0
    """
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return Correlation(math.nan, math.nan, len(x))
    from scipy.stats import pearsonr

    result = pearsonr(x, y)
    return Correlation(float(result.statistic), float(result.pvalue), len(x))


def weights_by_epoch(run: Run) -> dict[int, list[Row]]:
    """Rows of `weights.jsonl` by epoch, in row order.

    Raises:
        UserError: The run logged none.
    """
    if not run.weights:
        raise UserError(
            f"{run.folder} holds no gradient weights; give a run of fit whose objective reads whole forget answers, "
            "such as SimNPO, NPO, DPO or GradDiff"
        )
    found: dict[int, list[Row]] = {}
    for row in sorted(run.weights, key=lambda row: (row["epoch"], row["index"])):
        found.setdefault(row["epoch"], []).append(row)
    return found


def chosen_epochs(run: Run, epochs: Sequence[int]) -> list[int]:
    """Those of some epochs that the run has; the last one where it has none of them."""
    there = list(weights_by_epoch(run))
    return [epoch for epoch in epochs if epoch in there] or there[-1:]


def metric_by_epoch(run: Run, name: str) -> dict[int, float]:
    """A metric of the start model, as epoch 0, and after every evaluated epoch; without epochs that lack it."""
    found = [(0, run.metrics("start")), *((e["epoch"], e["metrics"]) for e in run.record.get("epochs", []))]
    return {epoch: metrics[name] for epoch, metrics in found if metrics.get(name) is not None}


def difficulty(run: Run) -> dict[int, float] | None:
    """The start model's loss on every forget row, nats per token: low for what it knows by heart.

    Returns:
        Row index to loss; None where the start model was not evaluated, or on other rows than were trained on (the
        losses of the first optimizer step tell).
    """
    known = {row["index"]: row["answer_nll"] for row in run.start_rows if row["split"] == "forget"}
    rows = [row for row in run.weights if row["epoch"] == 1]
    if not rows or any(row["index"] not in known or known[row["index"]] is None for row in rows):
        return None
    first = [row for row in rows if row["step"] == 1]
    same = all(abs(-row["logp"] / row["length"] - known[row["index"]]) < SAME_LOSS for row in first)
    return {row["index"]: known[row["index"]] for row in rows} if first and same else None


def summaries(run: Run, epochs: Sequence[int]) -> list[EpochSummary]:
    """Spread and correlations of the weights in some epochs."""
    by_epoch, hard = weights_by_epoch(run), difficulty(run)
    found = []
    for epoch in chosen_epochs(run, epochs):
        rows = by_epoch[epoch]
        weights = [row["weight"] for row in rows]
        found.append(
            EpochSummary(
                epoch,
                sum(weights) / len(weights),
                min(weights),
                max(weights),
                pearson([row["length"] for row in rows], weights),
                pearson([row["probability"] for row in rows], weights),
                None if hard is None else pearson([hard[row["index"]] for row in rows], weights),
            )
        )
    return found
