"""Preference objectives: a log-sigmoid bounds how far an answer's log-prob is lowered."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from simnpo_pl.objectives.base import ForgetInputs, Objective
from simnpo_pl.utils.errors import not_negative, positive


class NPO(Objective):
    """Negative preference optimization (Zhang et al. 2024, equation 3; SimNPO paper, equation 2).

    `-(2 / beta) * log sigmoid(-beta * (L - L_ref))` with L and L_ref the answer's log-prob under
    policy and reference, summed over tokens, in nats.

    Args:
        beta: Inverse temperature, above 0, per nat of the summed log-ratio. Towards 0 the loss
            becomes gradient ascent.
    """

    needs = frozenset({"forget", "reference"})

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = positive("--model.objective.beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        return -2 / self.beta * logsigmoid(-self.beta * (inputs.forget.total - inputs.reference_forget))


class DPO(NPO):
    """Direct preference optimization with a refusal preferred to the forget answer.

    `-(2 / beta) * log sigmoid(beta * [(L_a - L_ref_a) - (L - L_ref)])`, log-probs summed over tokens,
    in nats; a is the refusal (Rafailov et al. 2023, equation 7, scaled as NPO is).

    Args:
        beta: Inverse temperature, above 0, per nat of the summed log-ratio.
    """

    needs = frozenset({"forget", "alternate", "reference"})

    def forward(self, inputs: ForgetInputs) -> Tensor:
        forget = inputs.forget.total - inputs.reference_forget
        return -2 / self.beta * logsigmoid(self.beta * (self.preferred(inputs) - forget))

    def preferred(self, inputs: ForgetInputs) -> Tensor:
        """Log-ratio of the preferred answers, `(B,)` nats."""
        return inputs.alternate.total - inputs.reference_alternate


class AltPO(DPO):
    """Alternate preference optimization (arXiv 2409.13474): DPO with answers that the start model itself gives.

    The formula is that of `DPO`; a is an answer sampled from the start model before training, or one of
    `--data.alternates FILE`. A forget row with K of them makes K rows of an epoch, each with one of them.

    Args:
        beta: Inverse temperature, above 0, per nat of the summed log-ratio; 0.05 to 0.5 in the paper.
    """

    needs = frozenset({"forget", "sampled", "reference"})

    def preferred(self, inputs: ForgetInputs) -> Tensor:
        return inputs.sampled.total - inputs.reference_sampled


class SimNPO(Objective):
    """Simple NPO: no reference, log-probs normalized by answer length (SimNPO paper, equation 4).

    `-(2 / beta) * log sigmoid(-(beta / n) * L - gamma)` with L the answer's summed log-prob in nats and
    n its number of scored tokens. Defaults are the paper's for TOFU forget10; for forget05 it uses
    beta 2.5 and forget_weight 0.1375.

    Args:
        beta: Inverse temperature, above 0, per nat per token.
        gamma: Margin, added outside beta and at least 0. A margin `delta` inside beta, as in the
            official TOFU code and open-unlearning, is `gamma = beta * delta`.
    """

    default_forget_weight = 0.125

    def __init__(self, beta: float = 4.5, gamma: float = 0.0) -> None:
        super().__init__()
        self.beta = positive("--model.objective.beta", beta)
        self.gamma = not_negative("--model.objective.gamma", gamma)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        return -2 / self.beta * logsigmoid(-self.beta * inputs.forget.mean - self.gamma)


class LengthNormalizedNPO(NPO):
    """NPO with log-probs per token, the reference kept: `-(2 / beta) * log sigmoid(-(beta / n) (L - L_ref))`.

    NPO with one of SimNPO's two changes. L and L_ref are the answer's summed log-probs under policy and reference,
    nats, over n scored tokens.

    Args:
        beta: Inverse temperature, above 0, per nat per token.
    """

    def __init__(self, beta: float = 2.5) -> None:
        super().__init__(beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        log_ratio = inputs.forget.mean - inputs.reference_forget / inputs.forget.length.clamp(min=1)
        return -2 / self.beta * logsigmoid(-self.beta * log_ratio)


class ReferenceFreeNPO(NPO):
    """NPO without its reference, log-probs summed over tokens: `-(2 / beta) * log sigmoid(-beta L)`.

    NPO with the other of SimNPO's two changes. `beta` is as in NPO, per nat of the summed log-prob.
    """

    needs = frozenset({"forget"})

    def forward(self, inputs: ForgetInputs) -> Tensor:
        return -2 / self.beta * logsigmoid(-self.beta * inputs.forget.total)
