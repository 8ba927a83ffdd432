"""How much larger one metric is than another: a number to pick an epoch by."""

from typing import Any

from torchmetrics.wrappers.abstract import WrapperMetric

from simnpo_pl.metrics.base import RowMetric


class Gap(WrapperMetric):
    """One metric's value less another's; NaN while either is.

    The two are updated and synced on their own.

    Args:
        more: What is to be large, such as knowledge of the retain set.
        less: What is to be small, such as knowledge of the forget set.

    Example:
        >>> from simnpo_pl.metrics.answers import RowMean
        >>> import torch
        >>> parts = [RowMean("s", rows=1, scale=100), RowMean("s", rows=1, scale=100)]
        >>> for part, score in zip(parts, (0.75, 0.5)):
        ...     part.update(torch.tensor([0]), torch.tensor([0]), {"s": torch.tensor([score])})
        >>> Gap(*parts).compute()
        {'value': 25.0, 'n': 2.0}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, more: RowMetric, less: RowMetric, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.more = more
        self.less = less

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing of its own."""

    def compute(self) -> dict[str, float]:
        """The difference as "value" and the rows of both as "n"."""
        more, less = self.more.compute(), self.less.compute()
        return {"value": more["value"] - less["value"], "n": more["n"] + less["n"]}
