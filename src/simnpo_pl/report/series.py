"""Numbers behind the figures, apart from any plotting library."""

import math
from collections.abc import Sequence
from statistics import quantiles
from typing import NamedTuple

from simnpo_pl.runs.record import Row, Run


class Point(NamedTuple):
    """A model in the plane of the field's standard picture."""

    label: str
    utility: float
    """Model utility, 0 to 1."""
    log10_p: float
    """Forget quality, log10 of the p-value."""


class Gap(NamedTuple):
    """Where two empirical distribution functions are furthest apart; the distance is the KS statistic."""

    at: float
    low: float
    high: float


class Quartiles(NamedTuple):
    """Spread of the gradient weights of one epoch."""

    epoch: int
    low: float
    median: float
    high: float


def _point(label: str, metrics: dict[str, float]) -> Point | None:
    values = metrics.get("model_utility"), metrics.get("forget_quality/log10_p")
    return None if None in values else Point(label, *values)  # type: ignore[arg-type]


def path_of(run: Run) -> list[Point]:
    """The run's models after each evaluated epoch, the exported one last."""
    points = [_point(f"epoch {e['epoch']}", e["metrics"]) for e in run.record.get("epochs", [])]
    exported = run.record.get("exported_epoch")
    final = _point("final" if exported is None else f"exported, epoch {exported}", run.metrics("final"))
    return [point for point in (*points, final) if point is not None]


def start_of(run: Run) -> Point | None:
    """The start model."""
    return _point("start", run.metrics("start"))


def retrained_of(run: Run) -> Point | None:
    """The retrained model, whose forget quality against itself is 1."""
    utility = run.metrics("retrained").get("model_utility")
    return None if utility is None else Point("retrained", utility, 0.0)


def truth_ratios(rows: Sequence[Row]) -> list[float]:
    """Finite truth ratios of the forget rows."""
    found = [row.get("truth_ratio") for row in rows if row["split"] == "forget"]
    return [value for value in found if value is not None and math.isfinite(value)]


def distribution(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Empirical distribution function: sorted values, and the share of values up to each."""
    ordered = sorted(values)
    return ordered, [(i + 1) / len(ordered) for i in range(len(ordered))]


def largest_gap(one: Sequence[float], other: Sequence[float]) -> Gap:
    """Where the distribution functions of two samples differ most.

    Example:
        >>> largest_gap([1.0, 2.0], [2.0, 3.0])
        Gap(at=1.0, low=0.0, high=0.5)
    """

    def share(sample: Sequence[float], value: float) -> float:
        return sum(x <= value for x in sample) / len(sample)

    places = sorted({*one, *other})
    at = max(places, key=lambda x: abs(share(one, x) - share(other, x)))
    low, high = sorted((share(one, at), share(other, at)))
    return Gap(at, low, high)


def weight_quartiles(rows: Sequence[Row]) -> list[Quartiles]:
    """Quartiles of the rows' gradient weights, epoch by epoch."""
    by_epoch: dict[int, list[float]] = {}
    for row in rows:
        by_epoch.setdefault(row["epoch"], []).append(row["weight"])
    found = []
    for epoch, weights in sorted(by_epoch.items()):
        parts = quantiles(weights, n=4, method="inclusive") if len(weights) > 1 else weights * 3
        found.append(Quartiles(epoch, *parts))
    return found
