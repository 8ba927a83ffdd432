"""Retain losses: what keeps the policy on the retain rows while it forgets."""

from typing import Literal

import torch
from torch import Tensor

from simnpo_pl.models.logprobs import AnswerStates, Rows, Scorer, divergence
from simnpo_pl.objectives.base import RetainLoss, row_means
from simnpo_pl.objectives.checks import one_of


class NLL(RetainLoss):
    """Cross-entropy on the retain answers, nats per token."""

    reads_logps = True

    def forward(self, policy: AnswerStates, reference: AnswerStates | None = None) -> Tensor:
        return -policy.logps().mean


class KL(RetainLoss):
    """Divergence KL(reference || policy) over the whole vocabulary on the retain rows, nats per token.

    Args:
        average_over: `answers` averages over the scored positions. `all` averages over every position,
            questions and padding included, as public code does; it exists for comparison.
    """

    needs_reference = True

    def __init__(self, average_over: Literal["answers", "all"] = "answers") -> None:
        super().__init__()
        self.average_over = one_of("retain_loss.average_over", average_over, ("answers", "all"))
        self.every_position = average_over == "all"
        self.mean_over = "examples" if self.every_position else "tokens"

    def forward(self, policy: AnswerStates, reference: AnswerStates | None) -> Tensor:
        assert reference is not None
        return row_means(policy, policy.per_token(lambda logits, _, target: divergence(target, logits), reference))

    def over_all_positions(self, rows: Rows, policy: Scorer, reference: Scorer) -> Tensor:
        with torch.no_grad():
            target = reference.all_logits(rows)
        return divergence(target, policy.all_logits(rows)).mean(dim=-1)


class EmbedDiff(RetainLoss):
    """Squared distance of one layer's hidden states to the frozen reference's (Li et al. 2024, "The WMDP Benchmark").

    The retain term of RMU: the mean over dimensions of `(h - h_ref)^2` at every token of an answer, averaged over
    tokens.

    Args:
        layer: Number of the layer, from 0; the objective's own.
        average_over: `answers` averages over the answers' tokens. `crossed` divides the sum of each row by the
            number of tokens of every row of the forward pass, as public code does; it exists for comparison.
    """

    needs_reference = True
    layer: int

    def __init__(self, layer: int = 7, average_over: Literal["answers", "crossed"] = "answers") -> None:
        super().__init__()
        self.layer = layer
        self.average_over = one_of("retain_loss.average_over", average_over, ("answers", "crossed"))
        self.crossed = average_over == "crossed"
        self.mean_over = "examples" if self.crossed else "tokens"

    def forward(self, policy: AnswerStates, reference: AnswerStates | None) -> Tensor:
        assert reference is not None
        states, target = policy.layers[self.layer], reference.layers[self.layer].hidden
        return states.row_means((states.hidden - target).square().mean(dim=-1), self.crossed)
