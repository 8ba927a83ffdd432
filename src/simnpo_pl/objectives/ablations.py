"""Halves of the step from NPO to SimNPO: the reference dropped alone, the length normalised alone."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from simnpo_pl.objectives.base import ForgetInputs, Objective, given, positive


class LengthNormalisedNPO(Objective):
    """NPO with log-probs per token, the reference kept: `-(2 / beta) * log sigmoid(-(beta / n) (L - L_ref))`.

    L and L_ref are the answer's summed log-probs under policy and reference, nats, over n scored tokens.

    Args:
        beta: Inverse temperature, above 0, per nat per token.
    """

    needs = frozenset({"forget", "reference"})

    def __init__(self, beta: float = 2.5) -> None:
        super().__init__()
        self.beta = positive("beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Loss of each forget row, `(B,)`."""
        forget = given(inputs.forget)
        log_ratio = forget.mean - given(inputs.reference_forget) / forget.length.clamp(min=1)
        return -2 / self.beta * logsigmoid(-self.beta * log_ratio)


class ReferenceFreeNPO(Objective):
    """NPO without its reference, log-probs summed over tokens: `-(2 / beta) * log sigmoid(-beta L)`.

    Args:
        beta: Inverse temperature, above 0, per nat of the summed log-prob.
    """

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = positive("beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Loss of each forget row, `(B,)`."""
        return -2 / self.beta * logsigmoid(-self.beta * given(inputs.forget).total)
