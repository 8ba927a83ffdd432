"""Objectives that distill the policy from a teacher made of frozen models."""

import torch
from torch import Tensor

from simnpo_pl.models.logprobs import cross_entropy, divergence
from simnpo_pl.objectives.base import ForgetInputs, Objective, row_means
from simnpo_pl.objectives.checks import not_negative, positive


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
        self.beta = positive("beta", beta)

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
        self.alpha = not_negative("alpha", alpha)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        def to_teacher(logits: Tensor, labels: Tensor, reference: Tensor, memorizing: Tensor) -> Tensor:
            return divergence(logits, reference - self.alpha * (memorizing - reference).relu())

        frozen = inputs.reference_states, inputs.memorizing_states
        return row_means(inputs.states, inputs.states.per_token(to_teacher, *frozen))
