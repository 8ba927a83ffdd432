"""A custom metric: the probability of the forget answer that the model still knows best.

A mean over forget rows hides a single row that was not forgotten.
"""

import torch
from torch import Tensor

from simnpo_pl.metrics.base import RowMetric


class WorstProbability(RowMetric):
    """Largest exp(-nll) among the rows' answers, nll in nats per token.

    Args:
        rows: Number of rows of the split.

    Example:
        >>> metric = WorstProbability(rows=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]), {"nll": torch.tensor([0.0, 5.0])})
        >>> metric.compute()["value"]
        1.0
    """

    title = "worst prob."
    higher_is_better = False

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        """Probability of each row's answer, `(N,)`."""
        return torch.exp(-values[:, 0])

    def aggregate(self, row_values: Tensor) -> dict[str, float]:
        """The largest of these."""
        return {"value": row_values.max().item()}
