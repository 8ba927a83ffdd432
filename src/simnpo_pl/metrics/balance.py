"""One number for forgetting and keeping at once, to pick an epoch by."""

from collections.abc import Sequence
from typing import Any, cast

from torch.nn import ModuleList
from torchmetrics.wrappers.abstract import WrapperMetric

from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.base import RowMetric


class Balance(WrapperMetric):
    """Harmonic mean of some metrics and of what others lack of their largest value; NaN while any is.

    0 for a model that knows nothing of what it should keep, or everything of what it should forget. The parts are
    updated and synced on their own.

    Args:
        keep: What is to be large, such as knowledge of the retain set.
        forget: What is to be small, such as knowledge of the forget set.
        largest: Value of a part at most.

    Example:
        >>> from simnpo_pl.metrics.answers import RowMean
        >>> import torch
        >>> parts = [RowMean("s", rows=1, scale=100), RowMean("s", rows=1, scale=100)]
        >>> for part, score in zip(parts, (0.5, 0.75)):
        ...     part.update(torch.tensor([0]), torch.tensor([0]), {"s": torch.tensor([score])})
        >>> result = Balance(keep=parts[:1], forget=parts[1:], largest=100).compute()
        >>> round(result["value"], 3), result["n"]
        (33.333, 2.0)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(
        self, keep: Sequence[RowMetric], forget: Sequence[RowMetric], largest: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.keep = ModuleList(keep)
        self.forget = ModuleList(forget)
        self.largest = largest

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of its own."""

    def compute(self) -> dict[str, float]:
        """The harmonic mean as "value" and the number of parts as "n"."""
        values = [part.compute()["value"] for part in cast(list[RowMetric], list(self.keep))]
        values += [self.largest - part.compute()["value"] for part in cast(list[RowMetric], list(self.forget))]
        # Rounding may leave a part a hair above its largest value.
        parts = {str(number): max(value, 0.0) if value == value else value for number, value in enumerate(values)}
        known = all(value == value for value in values)
        return {"value": F.model_utility(parts) if known else float("nan"), "n": float(len(parts))}
