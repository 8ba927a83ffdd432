"""Objectives of the public MUSE code that read raw logits, to reproduce its tables.

They are not the losses of the papers whose names they bear: see the warnings below.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from simnpo_pl.objectives.base import ForgetInputs, Objective, Positions
from simnpo_pl.utils.errors import not_negative, positive


def _row_means(positions: Positions, values: Tensor) -> Tensor:
    """Means `(B,)` of values `(B, T, V)` over a row's tokens and the vocabulary."""
    mask = positions.mask.to(values.dtype)
    return (values.mean(dim=-1) * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)


class SimNPORawLogits(Objective):
    """What the SimNPO authors' MUSE code computes. Not SimNPO: for new work take `SimNPO`.

    `-(2 / beta) * log sigmoid(beta * (-z - delta))` of every logit z, averaged over positions, vocabulary and rows.
    No label is read and nothing is normalized, so it lowers all logits alike and is no likelihood; its values cannot
    be compared with SimNPO's. It exists to reproduce the published MUSE tables.

    Args:
        beta: Scale of the logits, above 0.
        delta: Margin inside beta, at least 0; that code calls it gamma.
    """

    needs = frozenset({"positions"})

    def __init__(self, beta: float = 0.7, delta: float = 0.0) -> None:
        super().__init__()
        self.beta = positive("--model.objective.beta", beta)
        self.delta = not_negative("--model.objective.delta", delta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        values = logsigmoid(self.beta * (-inputs.positions.logits - self.delta))
        return -2 / self.beta * _row_means(inputs.positions, values)


class NPORawLogits(Objective):
    """What the public MUSE code computes under the name NPO. Not NPO: for new work take `NPO`.

    `-(2 / beta) * log sigmoid(beta * (z_ref - z))` of every logit z of the policy and z_ref of the reference, averaged
    over positions, vocabulary and rows. No label is read and nothing is normalized, so it is no likelihood ratio; its
    values cannot be compared with NPO's. It exists to reproduce the published MUSE tables.

    Args:
        beta: Scale of the logits, above 0; the public code always has 0.1.
    """

    needs = frozenset({"positions", "reference_positions"})

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = positive("--model.objective.beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        difference = inputs.reference_positions - inputs.positions.logits
        return -2 / self.beta * _row_means(inputs.positions, logsigmoid(self.beta * difference))
