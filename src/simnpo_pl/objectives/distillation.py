"""Objectives that draw the policy to a teacher made of frozen models."""

from torch import Tensor

from simnpo_pl.models.logprobs import divergence
from simnpo_pl.objectives.base import ForgetInputs, Objective, given, not_negative, row_means


class RKLD(Objective):
    """Reverse-KL distillation (Wang et al. 2024, "RKLD", arXiv 2406.01983, section on the unlearning teacher).

    KL(policy || teacher) at every token of a forget answer, with
    `teacher = softmax(z_ref - alpha * relu(z_mem - z_ref))`: z_ref are the reference's logits, z_mem those of a
    memorising model, the start model fine-tuned further on the forget rows. What it makes likelier is taken off.

    Args:
        alpha: How much is taken off, at least 0; 0 leaves the reference itself.
    """

    needs = frozenset({"states", "reference_states", "memorising_states"})
    mean_over = "tokens"

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = not_negative("alpha", alpha)

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Mean over each answer's tokens, nats per token, `(B,)`."""

        def to_teacher(logits: Tensor, labels: Tensor, reference: Tensor, memorising: Tensor) -> Tensor:
            return divergence(logits, reference - self.alpha * (memorising - reference).relu())

        states, frozen = given(inputs.states), (given(inputs.reference_states), given(inputs.memorising_states))
        return row_means(states, states.per_token(to_teacher, *frozen))
