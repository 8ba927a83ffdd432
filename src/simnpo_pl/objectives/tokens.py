"""Objectives that are a mean over the tokens of an answer, each with a loss of its own."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from simnpo_pl.models.logprobs import cross_entropy, divergence
from simnpo_pl.objectives.base import ForgetInputs, Objective, row_means
from simnpo_pl.utils.errors import not_negative, positive


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
        self.beta = not_negative("--model.objective.beta", beta)

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
        self.beta1 = not_negative("--model.objective.beta1", beta1)
        self.beta2 = not_negative("--model.objective.beta2", beta2)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        logps = inputs.states.token_logps()
        probability = logps.detach().exp()
        return row_means(inputs.states, probability**self.beta1 * (1 - probability) ** self.beta2 * logps)


class IHL(Objective):
    """Inverted hinge loss (Cha et al. 2025, "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs").

    `1 + p - q` of each token, p the probability of the label, q that of the most probable other token: it moves
    probability from the label to that token alone, and is never below 0. The initialization of adapters of the same
    paper (FILA) is left out.
    """

    needs = frozenset({"states"})
    mean_over = "tokens"

    def forward(self, inputs: ForgetInputs) -> Tensor:
        def hinge(logits: Tensor, labels: Tensor) -> Tensor:
            probability, label = logits.softmax(dim=-1), labels.unsqueeze(1)
            others = probability.scatter(1, label, 0.0).amax(dim=-1)
            return 1 + probability.gather(1, label).squeeze(1) - others

        return row_means(inputs.states, inputs.states.per_token(hinge))


class JensUn(Objective):
    """Jensen-Shannon unlearning (arXiv 2509.02820); its retain loss is `JSD`.

    Jensen-Shannon divergence, nats, at each token of a forget answer, of the policy and the distribution that is
    certain of a refusal's token; the refusal's tokens are repeated to the length of the answer. With p the policy's
    probability of that token it is `log 2 + (p log p - (1 + p) log(1 + p)) / 2`, between 0 and log 2. Public code
    clamps both distributions to at least 1e-9, which lowers the loss by 4e-9 for each token of the vocabulary.
    """

    needs = frozenset({"states", "alternate_tokens"})
    mean_over = "tokens"

    def forward(self, inputs: ForgetInputs) -> Tensor:
        logps = replace(inputs.states, labels=inputs.alternate_tokens, known_logps=None).token_logps()
        probability = logps.exp()
        entropies = probability * logps - (1 + probability) * probability.log1p()
        return row_means(inputs.states, math.log(2) + 0.5 * entropies)


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


class UNDIAL(Objective):
    """Self-distillation with adjusted logits (Dong et al. 2024, "UNDIAL", section 3); no retain term by default.

    Cross-entropy of the policy against the reference's distribution with `beta` subtracted from the label's logit,
    over the answers' tokens. Public code averages over prompt and padding too.

    Args:
        beta: What is subtracted from the label's logit, above 0. The public learning rate is 1e-4.
    """

    needs = frozenset({"states", "reference_states"})
    mean_over = "tokens"
    default_retain_weight = 0.0

    def __init__(self, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = positive("--model.objective.beta", beta)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        def adjusted(logits: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
            off = torch.full_like(labels, -self.beta, dtype=reference.dtype).unsqueeze(1)
            target = reference.scatter_add(1, labels.unsqueeze(1), off).softmax(dim=-1)
            return cross_entropy(logits, target)

        return row_means(inputs.states, inputs.states.per_token(adjusted, inputs.reference_states))


class RKLD(Objective):
    """Reverse-KL distillation (Wang et al. 2024, "RKLD", arXiv 2406.01983, section on the unlearning teacher).

    KL(policy || teacher) at every token of a forget answer, nats, with
    `teacher = softmax(z_ref - alpha * relu(z_mem - z_ref))`: z_ref are the reference's logits, z_mem those of a
    memorizing model, the start model fine-tuned further on the forget rows. The teacher
    lowers tokens that the memorizing model prefers.

    Args:
        alpha: How much is subtracted, at least 0; 0 leaves the reference itself.
    """

    needs = frozenset({"states", "reference_states", "memorizing_states"})
    mean_over = "tokens"

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = not_negative("--model.objective.alpha", alpha)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        def to_teacher(logits: Tensor, labels: Tensor, reference: Tensor, memorizing: Tensor) -> Tensor:
            return divergence(logits, reference - self.alpha * (memorizing - reference).relu())

        frozen = inputs.reference_states, inputs.memorizing_states
        return row_means(inputs.states, inputs.states.per_token(to_teacher, *frozen))
