"""What a run of the study of SmolLM2 measured, and the comparison of two methods by pairs of runs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from smollm2_choice import metrics_of

DRAWS = 2000
"""Of the bootstrap."""
HOLDS, OPPOSITE = "holds here", "does not hold here: the opposite was measured"
UNKNOWN, MISSING = "cannot be told with these runs", "not measured"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Model:
    """One measured model with the attacks on it.

    Args:
        result: Of the run.
        reference: Of the first retrained model.
        relearned: Metrics before relearning and after each of its epochs.
        rounded: Metrics with rounded weights.
        sampled: leak@1, leak@k and the best ROUGE-L recall of k sampled answers, means over rows.
        best: `(N,)` best ROUGE-L recall of the sampled answers of every forget row.
    """

    result: dict[str, Any]
    reference: dict[str, Any]
    relearned: list[dict[str, float]] | None = None
    rounded: dict[str, float] | None = None
    sampled: list[float] | None = None
    best: Array | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return metrics_of(self.result)

    @cached_property
    def forget(self) -> dict[str, Array]:
        """Scores of the forget rows, `(N,)` each."""
        return columns(self.result, "forget")

    @cached_property
    def reference_forget(self) -> dict[str, Array]:
        return columns(self.reference, "forget")

    def ks(self, weights: dict[str, Array]) -> Array:
        """KS statistic `(D,)` of the truth ratios against the reference's, for row weights `(D, N)`."""
        both = np.concatenate([self.forget["truth_ratio"], self.reference_forget["truth_ratio"]])
        order = np.argsort(both, kind="stable")
        rows, sign = order % len(self.forget["truth_ratio"]), np.where(order < len(both) // 2, 1.0, -1.0)
        counts = weights["forget"]
        drawn = np.maximum(counts.sum(axis=1, keepdims=True), 1)
        gaps = np.abs(np.cumsum(counts[:, rows] * sign, axis=1)) / drawn
        last = np.append(np.diff(both[order]) > 0, True)
        return gaps[:, last].max(axis=1)

    def mean(self, split: str, score: str, weights: dict[str, Array]) -> Array:
        return weighted(columns(self.result, split)[score], weights[split])

    def distance(self, weights: dict[str, Array]) -> Array:
        """How far forget probability is from the reference's."""
        there = weighted(self.reference_forget["probability"], weights["forget"])
        return np.abs(self.mean("forget", "probability", weights) - there)

    def utility(self, weights: dict[str, Array]) -> Array:
        """Harmonic mean of the nine parts."""
        parts = []
        for split in ("retain", "real_authors", "world_facts"):
            scores = columns(self.result, split)
            for values in (scores["probability"], scores["rougeL_recall"], np.maximum(0, 1 - scores["truth_ratio"])):
                parts.append(weighted(values, weights[split]))
        return len(parts) / (1 / np.maximum(parts, 1e-12)).sum(axis=0)

    def length_gap(self, weights: dict[str, Array]) -> Array:
        """KS statistic on the half of the rows with the shortest answers, less that on the other half."""
        length = np.array([len(answer) for answer in self.result["rows"]["forget"]["answer"]])
        short = np.argsort(np.argsort(length, kind="stable")) < len(length) / 2
        return self.ks({"forget": weights["forget"] * short}) - self.ks({"forget": weights["forget"] * ~short})

    def leaked(self, weights: dict[str, Array]) -> Array | None:
        return None if self.best is None else weighted(self.best, weights["forget"])

    def rise(self, weights: dict[str, Array]) -> Array | None:
        """Forget probability at the peak of relearning, less that before it; its rows were not kept."""
        return self._relearned("forget/probability", lambda curve: max(curve) - curve[0], weights)

    def relearned_ks(self, weights: dict[str, Array]) -> Array | None:
        """KS statistic after the last epoch of relearning."""
        return self._relearned("forget_quality/ks_statistic", lambda curve: curve[-1], weights)

    def _relearned(self, metric: str, read: Callable[[list[float]], float], weights: dict[str, Array]) -> Array | None:
        if self.relearned is None:
            return None
        return np.full(len(weights["forget"]), read([epoch[metric] for epoch in self.relearned]))

    def regained(self, weights: dict[str, Array]) -> Array | None:
        """Forget probability with rounded weights, less that with the exact ones."""
        if self.rounded is None:
            return None
        change = self.rounded["forget/probability"] - self.metrics["forget/probability"]
        return np.full(len(weights["forget"]), change)


def columns(result: dict[str, Any], split: str) -> dict[str, Array]:
    """Scores of a split's rows, `(N,)` each."""
    scores = result["rows"][split].items()
    return {name: np.array(values, float) for name, values in scores if not isinstance(values[0], str)}


def weighted(values: Array, weights: Array) -> Array:
    """Means `(D,)` of `(N,)` values under `(D, N)` weights."""
    return weights @ values / weights.sum(axis=1)


@dataclass(frozen=True)
class Measure:
    """What methods are compared by.

    Args:
        title: Of its row.
        better: 1 where a higher value is better, -1 where a lower one is.
        value: `(D,)` values of a model for the rows' weights; None where it was not measured.
        by_row: Whether rows are resampled, too.
    """

    title: str
    better: int
    value: Callable[[Model, dict[str, Array]], Array | None]
    by_row: bool = True


MEASURES = {
    "ks": Measure("KS statistic against the retrained model", -1, Model.ks),
    "distance": Measure("distance of forget probability from the retrained model's", -1, Model.distance),
    "utility": Measure("model utility", 1, Model.utility),
    "length": Measure("KS on short answers less KS on long ones", -1, Model.length_gap),
    "relearned": Measure("KS after relearning", -1, Model.relearned_ks, False),
    "rise": Measure("rise of forget probability by relearning, at its peak", -1, Model.rise, False),
    "rounded": Measure("rise of forget probability by 4-bit weights", -1, Model.regained, False),
    "leak": Measure("best ROUGE of the sampled answers", -1, Model.leaked),
}
CLAIMS = (
    ("SimNPO comes closer to the retrained model than NPO does", "ks", "NPO"),
    ("SimNPO keeps more model utility than NPO does", "utility", "NPO"),
    ("SimNPO forgets short answers more like long ones than NPO does", "length", "NPO"),
    ("SimNPO is closer to the retrained model than NPO after relearning", "relearned", "NPO"),
    ("relearning brings back less after SimNPO than after NPO", "rise", "NPO"),
    ("SimNPO keeps more model utility than gradient difference does", "utility", "GradDiff"),
)
"""Claims of the paper, with the measure and the method that SimNPO is compared with."""


@dataclass(frozen=True)
class Difference:
    """SimNPO less another method: mean over pairs of runs, 95 % interval of the bootstrap, and number of pairs."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def verdict(self, better: int) -> str:
        """Whether SimNPO is better, by whether the interval contains 0."""
        low, high = sorted((better * self.low, better * self.high))
        return HOLDS if low > 0 else OPPOSITE if high < 0 else UNKNOWN


def compare(measure: Measure, ours: dict[str, Model], others: dict[str, Model]) -> Difference | None:
    """Runs of one start model and seed are a pair; pairs and rows are drawn with replacement, rows alike for all.

    Args:
        measure: What is compared.
        ours: Runs of SimNPO by pair.
        others: Runs of the other method by pair.

    Returns:
        None with fewer than two measured pairs.
    """
    pairs = [(ours[name], others[name]) for name in sorted(ours.keys() & others.keys())]
    if not pairs:
        return None
    random = np.random.default_rng(0)
    sizes = {
        split: len(rows["answer_nll"]) for split, rows in pairs[0][0].result["rows"].items() if "answer_nll" in rows
    }
    one = {split: np.ones((1, size)) for split, size in sizes.items()}
    drawn = one
    if measure.by_row:
        drawn = {s: random.multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float) for s, n in sizes.items()}
    exact: list[Array] = []
    resampled: list[Array] = []
    for ours_of, other in pairs:
        for found, weights in ((exact, one), (resampled, drawn)):
            mine, theirs = measure.value(ours_of, weights), measure.value(other, weights)
            if mine is not None and theirs is not None:
                found.append(mine - theirs)
    if len(exact) < 2:
        return None
    chosen = random.integers(len(exact), size=(DRAWS, len(exact)))
    draws = np.arange(DRAWS)[:, None] if measure.by_row else 0
    low, high = np.quantile(np.array(resampled)[chosen, draws].mean(axis=1), (0.025, 0.975))
    return Difference(float(np.mean(exact)), float(low), float(high), len(exact))
