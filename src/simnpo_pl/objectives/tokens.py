"""Objectives that weight every token of an answer separately."""

import torch
from torch import Tensor

from simnpo_pl.models.logprobs import cross_entropy
from simnpo_pl.objectives.base import ForgetInputs, Objective, row_means
from simnpo_pl.objectives.checks import not_negative


class WGA(Objective):
    """Weighted gradient ascent (Wang et al. 2025, "Rethinking LLM Unlearning Objectives", section 5).

    `p^beta * log p` of each token, the weight `p^beta` without gradient: tokens already forgotten hardly change.

    Args:
        beta: Exponent of the token's probability, at least 0; 0 is gradient ascent.
    """

    needs = frozenset({"states"})
    mean_over = "tokens"

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = not_negative("beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        logps = inputs.states.token_logps()
        return row_means(inputs.states, (self.beta * logps.detach()).exp() * logps)


class SatImp(Objective):
    """Ascent weighted by saturation and importance (Yang et al. 2025, "Exploring Criteria of Loss Reweighting").

    `p^beta1 (1 - p)^beta2 * log p` of each token, the weight without gradient.

    Args:
        beta1: Exponent of the token's probability, at least 0.
        beta2: Exponent of its complement, at least 0.
    """

    needs = frozenset({"states"})
    mean_over = "tokens"
    default_forget_weight = 0.1

    def __init__(self, beta1: float = 5.0, beta2: float = 1.0) -> None:
        super().__init__()
        self.beta1 = not_negative("beta1", beta1)
        self.beta2 = not_negative("beta2", beta2)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        logps = inputs.states.token_logps()
        probability = logps.detach().exp()
        return row_means(inputs.states, probability**self.beta1 * (1 - probability) ** self.beta2 * logps)


class CEU(Objective):
    """Cross-entropy unlearning (Yang 2025, "CE-U: Cross Entropy Unlearning"); no retain term by default.

    Cross-entropy of the policy against its own distribution with the label's probability removed, without gradient.
    The first token of an answer is left out, so that the answer's form is kept.
    """

    needs = frozenset({"states"})
    mean_over = "tokens"
    skipped_tokens = 1
    default_retain_weight = 0.0

    def forward(self, inputs: ForgetInputs) -> Tensor:
        def without_label(logits: Tensor, labels: Tensor) -> Tensor:
            target = logits.detach().scatter(1, labels.unsqueeze(1), -torch.inf).softmax(dim=-1)
            return cross_entropy(logits, target)

        states = inputs.states
        entropy = states.per_token(without_label)
        first = torch.ones_like(states.rows, dtype=torch.bool)
        first[1:] = states.rows[1:] != states.rows[:-1]
        return row_means(states, entropy.masked_fill(first, 0.0), skipped=self.skipped_tokens)
