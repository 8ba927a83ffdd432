"""Objectives that weigh every token of an answer by itself."""

import torch
from torch import Tensor

from simnpo_pl.models.logprobs import cross_entropy
from simnpo_pl.objectives.base import ForgetInputs, Objective, given, not_negative, positive, row_means


class WGA(Objective):
    """Weighted gradient ascent (Wang et al. 2025, "Rethinking LLM Unlearning Objectives", section 5).

    `p^beta * log p` of each token, the weight `p^beta` held fixed: tokens already forgotten are left alone.

    Args:
        beta: Exponent of the token's probability, at least 0; 0 is gradient ascent.
    """

    needs = frozenset({"states"})
    mean_over = "tokens"

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = not_negative("beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Mean over each answer's tokens, `(B,)`."""
        states = given(inputs.states)
        logps = states.token_logps()
        return row_means(states, (self.beta * logps.detach()).exp() * logps)


class SatImp(Objective):
    """Ascent weighted by saturation and importance (Yang et al. 2025, "Exploring Criteria of Loss Reweighting").

    `p^beta1 (1 - p)^beta2 * log p` of each token, the weight held fixed.

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
        """Mean over each answer's tokens, `(B,)`."""
        states = given(inputs.states)
        logps = states.token_logps()
        probability = logps.detach().exp()
        return row_means(states, probability**self.beta1 * (1 - probability) ** self.beta2 * logps)


class CEU(Objective):
    """Cross-entropy unlearning (Yang 2025, "CE-U: Cross Entropy Unlearning"); no retain term.

    Cross-entropy of the policy against its own distribution with the label's probability taken out, held fixed. The
    first token of an answer is left out, so that the answer's form is kept.
    """

    needs = frozenset({"states"})
    mean_over = "tokens"
    skipped_tokens = 1
    default_retain_weight = 0.0

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Mean over each answer's tokens but the first, `(B,)`."""
        states = given(inputs.states)

        def without_label(logits: Tensor, labels: Tensor) -> Tensor:
            target = logits.detach().scatter(1, labels.unsqueeze(1), -torch.inf).softmax(dim=-1)
            return cross_entropy(logits, target)

        entropy = states.per_token(without_label)
        first = torch.ones_like(states.rows, dtype=torch.bool)
        first[1:] = states.rows[1:] != states.rows[:-1]
        return row_means(states, entropy.masked_fill(first, 0.0), skipped=self.skipped_tokens)


class UNDIAL(Objective):
    """Self-distillation with adjusted logits (Dong et al. 2024, "UNDIAL", section 3); no retain term by default.

    Cross-entropy of the policy against the reference's distribution with `beta` taken off the label's logit, over the
    answers' tokens. Public code averages over prompt and padding too.

    Args:
        beta: What is taken off the label's logit, above 0. The public learning rate is 1e-4.
    """

    needs = frozenset({"states", "reference_states"})
    mean_over = "tokens"
    default_retain_weight = 0.0

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = positive("beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Mean over each answer's tokens, `(B,)`."""

        def adjusted(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
            off = torch.full_like(labels, -self.beta, dtype=reference.dtype).unsqueeze(1)
            target = reference.scatter_add(1, labels.unsqueeze(1), off).softmax(dim=-1)
            return cross_entropy(logits, target)

        states = given(inputs.states)
        return row_means(states, states.per_token(adjusted, given(inputs.reference_states)))
