"""Membership inference: how well a score of each row separates the forget split from a holdout split.

Holdout rows are of the same kind as the forget rows but were never to be forgotten. Every attack gives a row a score
that is low for text the model was trained on, like a loss.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from simnpo_pl.metrics.base import CombinedMetric, RowMetric

ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_reference", "mia_gradnorm")
"""Names of the six attacks' results, as open-unlearning has them."""


def membership_auc(forget: Tensor, holdout: Tensor) -> float:
    """Probability that a forget row has a lower score than a holdout row; ties count half.

    1: forget rows look far more like training data than holdout rows; 0.5: no difference; 0: the opposite of 1.

    Args:
        forget: `(N,)` scores of the forget rows, low for text the model was trained on.
        holdout: `(M,)` scores of the holdout rows.

    Returns:
        Area under the ROC curve, exact; NaN if a score is NaN or a split has no row.

    Example:
        >>> membership_auc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0]))
        0.875
    """
    pairs = forget.numel() * holdout.numel()
    if not pairs:
        return math.nan
    samples = (scores.double().cpu().numpy() for scores in (holdout, forget))
    return float(mannwhitneyu(*samples, method="asymptotic").statistic / pairs)


def privleak(auc: float, retrained_auc: float) -> float:
    """Relative distance, in percent, of a model's 1 - AUC from the retrained model's (arXiv 2407.06460).

    0 is what retraining gives; below 0 the forget rows look more like training data than to the retrained model
    (under-unlearning), above 0 less (over-unlearning).

    Args:
        auc: `membership_auc` of this model.
        retrained_auc: `membership_auc` of the retrained model.

    Returns:
        ((1 - auc) - (1 - retrained_auc)) / (1 - retrained_auc) * 100; NaN where retrained_auc is 1.

    Example:
        >>> privleak(0.75, 0.5)
        -50.0
    """
    return math.nan if retrained_auc == 1 else (retrained_auc - auc) / (1 - retrained_auc) * 100


class ZlibScore(RowMetric):
    """Loss of each answer over its length in bytes once compressed by zlib: nats per token and byte."""

    def __init__(self, answers: Sequence[str], **kwargs: Any) -> None:
        super().__init__(len(answers), **kwargs)
        self.bytes = torch.tensor([len(zlib.compress(text.encode())) for text in answers], dtype=torch.float64)

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        return values[:, 0] / self.bytes


class ReferenceScore(RowMetric):
    """Loss of each answer above its loss under a reference model, `(N,)` nats per token, to five decimals.

    Smaller differences are rounding errors, which would separate a model from itself.
    """

    def __init__(self, reference: Tensor, **kwargs: Any) -> None:
        super().__init__(len(reference), **kwargs)
        self.reference = reference.detach().double().cpu()

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        return torch.round(values[:, 0] - self.reference, decimals=5)


class MembershipAUC(CombinedMetric):
    """Area under the ROC curve of one attack; see `membership_auc`."""

    result_keys: tuple[str, ...] = ("value", "m")

    def __init__(self, forget: RowMetric, holdout: RowMetric, **kwargs: Any) -> None:
        super().__init__({"forget": forget, "holdout": holdout}, **kwargs)

    def compute(self) -> dict[str, float]:
        """The AUC as "value", the numbers of forget and of holdout rows as "n" and "m"."""
        rows = []
        for part in self.parts.values():
            part.compute()
            rows.append(torch.tensor(list(part.rows.values()), dtype=torch.float64))
        return {"value": membership_auc(*rows), "n": float(len(rows[0])), "m": float(len(rows[1]))}


class PrivLeak(MembershipAUC):
    """`privleak` of the Min-K% attack against the retrained model's own AUC, which must be below 1."""

    result_keys = ("value", "m", "retrained_auc")

    def __init__(self, attack: MembershipAUC, retrained_auc: float, **kwargs: Any) -> None:
        super().__init__(**attack.parts, **kwargs)
        self.retrained_auc = retrained_auc

    def compute(self) -> dict[str, float]:
        """PrivLeak in percent as "value", rows as "n" and "m", and the retrained model's AUC."""
        result = super().compute()
        value = privleak(result["value"], self.retrained_auc)
        return {**result, "value": value, "retrained_auc": self.retrained_auc}
