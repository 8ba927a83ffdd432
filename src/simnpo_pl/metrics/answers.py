"""The metrics of answers as torchmetrics classes: each keeps per-row scores and reduces them at the end."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.base import CombinedMetric, RowMetric
from simnpo_pl.utils.errors import UserError


class AnswerProbability(RowMetric):
    """Mean of exp(-nll) of the answers (forget and retain splits).

    Args:
        rows: Number of rows of the split.
        kind: Which answer of a row: 0 the true one, 1 its paraphrase where the split has one.
    """

    def __init__(self, rows: int, kind: int = 0, **kwargs: Any) -> None:
        super().__init__(rows, kind + 1, **kwargs)
        self.kind = kind

    def complete(self, seen: Tensor) -> Tensor:
        return seen[:, self.kind]

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        return F.answer_probability(values[:, self.kind])


class ChoiceProbability(RowMetric):
    """Mean probability of the right answer, kind 0, among itself and the wrong ones (authors and facts splits)."""

    higher_is_better = True

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        return F.choice_probability(values[:, 0], values[:, 1:])


class RowMean(RowMetric):
    """Mean of a score that each answer has, such as "rougeL_recall" or "extraction_strength".

    Args:
        feature: The score to average.
        rows: Number of rows of the split.
        scale: Factor of the mean; the rows keep their scores.
    """

    def __init__(self, feature: str, rows: int, scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(rows, **kwargs)
        self.feature = feature
        self.scale = scale

    def averaged(self, row_values: Tensor) -> Tensor:
        return self.scale * row_values


class TruthRatio(RowMetric):
    """Aggregated truth ratio of a split.

    Args:
        rows: Number of rows of the split.
        kinds: Number of kinds, the wrong answers last.
        convention: "geometric", "arithmetic" or "prob_mean", see `functional.truth_ratio`.
        aggregate: "forget" averages min(R, 1/R), "utility" averages max(0, 1 - R); "prob_mean" ratios are between 0 and
            1 and are simply averaged in both cases.
        has_paraphrase: Whether kind 1 is the paraphrase and 2 onwards are wrong answers; otherwise kind 0 takes the
            paraphrase's place and 1 onwards are wrong answers.

    Raises:
        UserError: An unknown convention or aggregate, or too few kinds.
    """

    def __init__(
        self,
        rows: int,
        kinds: int,
        convention: str = "geometric",
        aggregate: str = "forget",
        has_paraphrase: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(rows, kinds, **kwargs)
        if convention not in F.CONVENTIONS or aggregate not in ("forget", "utility"):
            raise UserError(
                f"{type(self).__name__}: expected a convention out of {', '.join(F.CONVENTIONS)} and an aggregate out "
                f"of forget, utility, got {convention!r} and {aggregate!r}: choose from these"
            )
        self.right = int(has_paraphrase)
        if kinds < self.right + 2:
            raise UserError(
                f"{type(self).__name__}: expected at least {self.right + 2} kinds, got {kinds}: "
                "count the answer, the paraphrase if there is one, and at least one wrong answer"
            )
        self.convention = convention
        self.goal = aggregate

    def complete(self, seen: Tensor) -> Tensor:
        """Rows with a right answer and every wrong one; with a paraphrase the answer is not needed."""
        return seen[:, self.right :].all(dim=1)

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        return F.truth_ratio(values[:, self.right], values[:, self.right + 1 :], self.convention)

    def averaged(self, row_values: Tensor) -> Tensor:
        if self.convention == "prob_mean":
            return row_values
        return F.closeness(row_values) if self.goal == "forget" else F.truthfulness(row_values)


class ForgetQuality(TruthRatio):
    """Kolmogorov-Smirnov p-value between the truth ratios of this model and of a retrained one.

    Compares the rows that were fully scored here with the same rows of the retrained model. With a NaN on either side,
    every entry but "n" and "m" is NaN.

    Args:
        rows: Number of rows of the forget split.
        kinds: Number of kinds, the wrong answers last.
        retrained: `(rows,)` geometric truth ratios of the retrained model, in row order.
        has_paraphrase: See `TruthRatio`.

    Raises:
        UserError: `retrained` does not hold one ratio a row.
    """

    higher_is_better = True
    result_keys = ("value", "log10_p", "ks_statistic", "m")

    def __init__(self, rows: int, kinds: int, retrained: Tensor, has_paraphrase: bool = True, **kwargs: Any) -> None:
        super().__init__(rows, kinds, has_paraphrase=has_paraphrase, **kwargs)
        if tuple(retrained.shape) != (rows,):
            raise UserError(
                f"ForgetQuality: expected {rows} truth ratios of the retrained model, one a row, got shape "
                f"{tuple(retrained.shape)}: use a log of the retrained model on the same forget split"
            )
        self.retrained = retrained.detach().double().cpu()

    def aggregate(self, row_values: Tensor) -> dict[str, float]:
        """The test's p-value as "value", its log10, the statistic, and the retrained sample's size."""
        retrained = self.retrained[list(self.rows)]
        if row_values.isnan().any() or retrained.isnan().any():
            return {**dict.fromkeys(self.result_keys, math.nan), "m": float(len(retrained))}
        found = F.forget_quality(row_values, retrained)
        values = (found.p_value, found.log10_p, found.ks_statistic, float(found.m))
        return dict(zip(self.result_keys, values, strict=True))


class ModelUtility(CombinedMetric):
    """Harmonic mean of other metrics' values, NaN if one of them is."""

    higher_is_better = True

    def compute(self) -> dict[str, float]:
        """The harmonic mean as "value", and the number of parts as "n"."""
        values = {name: self.part_value(name, part.compute()["value"]) for name, part in self.parts.items()}
        return {"value": F.model_utility(values), "n": float(len(values))}

    def part_value(self, name: str, value: float) -> float:
        """What a part's value counts as in the mean."""
        return value


class Balance(ModelUtility):
    """Harmonic mean of some metrics and of what others lack of their largest value; NaN if one is.

    0 for a model that knows nothing of what it should keep, or everything of what it should forget.

    Args:
        keep: What is to be large, such as knowledge of the retain set.
        forget: What is to be small, such as knowledge of the forget set.
        largest: Value of a part at most.
    """

    def __init__(
        self, keep: Sequence[RowMetric], forget: Sequence[RowMetric], largest: float = 1.0, **kwargs: Any
    ) -> None:
        named = (("keep", keep), ("lack", forget))
        super().__init__({f"{name} {n}": m for name, metrics in named for n, m in enumerate(metrics)}, **kwargs)
        self.largest = largest

    def part_value(self, name: str, value: float) -> float:
        # Rounding may leave a value slightly above its largest.
        return max(self.largest - value, 0.0) if name.startswith("lack") else value
