"""Retain losses: what keeps the policy on the retain rows while it forgets."""

from typing import Literal

from torch import Tensor

from simnpo_pl.models.logprobs import divergence, jensen_shannon
from simnpo_pl.objectives.base import RetainInputs, RetainLoss, row_means
from simnpo_pl.utils.errors import one_of

__all__ = ["JSD", "KL", "NLL", "EmbedDiff", "RetainLoss"]


class NLL(RetainLoss):
    """Cross-entropy on the retain answers, nats per token."""

    needs = frozenset({"retain"})

    def forward(self, inputs: RetainInputs) -> Tensor:
        return -inputs.retain.mean


class KL(RetainLoss):
    """Divergence KL(reference || policy) over the whole vocabulary on the retain rows, nats per token.

    Args:
        average_over: `answers` averages over the scored positions. `all` averages over every position,
            questions and padding included, as public code does; it exists for comparison.
    """

    def __init__(self, average_over: Literal["answers", "all"] = "answers") -> None:
        super().__init__()
        self.average_over = one_of("--model.retain_loss.average_over", average_over, ("answers", "all"))
        read = "states" if average_over == "answers" else "positions"
        self.needs = frozenset({read, f"reference_{read}"})
        self.mean_over = "tokens" if average_over == "answers" else "examples"

    def forward(self, inputs: RetainInputs) -> Tensor:
        if self.average_over == "all":
            return divergence(inputs.reference_positions, inputs.positions.logits).mean(dim=-1)
        policy, reference = inputs.states, inputs.reference_states
        return row_means(policy, policy.per_token(lambda logits, _, target: divergence(target, logits), reference))


class JSD(RetainLoss):
    """Jensen-Shannon divergence of reference and policy on the retain answers, nats per token, at most log 2.

    The retain term of JensUn (arXiv 2509.02820).
    """

    needs = frozenset({"states", "reference_states"})

    def forward(self, inputs: RetainInputs) -> Tensor:
        def divergence(logits: Tensor, _: Tensor, reference: Tensor) -> Tensor:
            return jensen_shannon(reference, logits)

        return row_means(inputs.states, inputs.states.per_token(divergence, inputs.reference_states))


class EmbedDiff(RetainLoss):
    """Squared distance of one layer's hidden states to the frozen reference's (Li et al. 2024, "The WMDP Benchmark").

    The retain term of RMU: the mean over dimensions of `(h - h_ref)^2` at every token of an answer, averaged over
    tokens.

    Args:
        layer: Number of the layer, from 0; the objective's own.
        average_over: `answers` averages over the answers' tokens. `crossed` multiplies each row's sum by the mean of
            1/length over the rows of the forward pass, as public code does; it exists for comparison.
    """

    needs = frozenset({"states", "reference_states"})
    layer: int

    def __init__(self, layer: int = 7, average_over: Literal["answers", "crossed"] = "answers") -> None:
        super().__init__()
        self.layer = layer
        self.average_over = one_of("--model.retain_loss.average_over", average_over, ("answers", "crossed"))
        self.mean_over = "tokens" if average_over == "answers" else "examples"

    def forward(self, inputs: RetainInputs) -> Tensor:
        states, target = inputs.states.layers[self.layer], inputs.reference_states.layers[self.layer]
        squares = (states.hidden - target.hidden).square().mean(dim=-1)
        return states.row_means(squares, self.average_over == "crossed")
