"""Objectives that hold the retain loss below a bound instead of adding it."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from simnpo_pl.data.tokenization import IGNORE_INDEX
from simnpo_pl.objectives.base import ForgetInputs, Objective, row_means
from simnpo_pl.utils.errors import not_negative, one_of


class PDU(Objective):
    """Primal-dual unlearning (Entesari et al. 2025, "Constrained Entropic Unlearning").

    The forget loss is `(largest logit - mean logit)^2`, averaged over the positions that predict an answer's tokens: 0
    where all tokens are equally probable. The retain loss is to stay at or below `eps`: it enters the total as
    `dual * (retain loss - eps)`, and after every optimizer step past the warm-up
    `dual = max(0, dual + step * (retain loss - eps))`, with the retain loss of the whole effective batch. `dual` starts
    at the retain weight, is logged and is part of the checkpoint.

    Args:
        eps: Bound of the retain loss, at least 0, in its unit; 0.3 nats per token is the public value for TOFU.
        step: Step size of the dual variable, at least 0.
        warmup_epochs: Epochs before the dual variable moves, at least 0.
        average_over: `answers` averages over the positions that predict the answers' tokens. `labels` averages over the
            positions of these tokens themselves, as public code does; it exists for comparison.
    """

    mean_over = "tokens"
    needs_retain = True
    checkpointed = ("dual",)

    def __init__(
        self,
        eps: float = 0.3,
        step: float = 1.0,
        warmup_epochs: int = 5,
        average_over: Literal["answers", "labels"] = "answers",
    ) -> None:
        super().__init__()
        self.eps = not_negative("--model.objective.eps", eps)
        self.step = not_negative("--model.objective.step", step)
        self.warmup_epochs = int(not_negative("--model.objective.warmup_epochs", warmup_epochs))
        self.average_over = one_of("--model.objective.average_over", average_over, ("answers", "labels"))
        self.needs = frozenset({"positions" if average_over == "labels" else "states"})
        self.dual: float | None = None

    def forward(self, inputs: ForgetInputs) -> Tensor:
        if self.average_over == "answers":
            return row_means(inputs.states, inputs.states.per_token(lambda logits, _: _flatness(logits)))
        counted = inputs.positions.labels != IGNORE_INDEX
        values = _flatness(inputs.positions.logits) * counted
        return values.sum(dim=-1) / counted.sum(dim=-1).clamp(min=1)

    def total(self, forget: Tensor, retain: Tensor, forget_weight: float, retain_weight: float) -> Tensor:
        """Lagrangian of the two losses."""
        return forget_weight * forget + self._dual(retain_weight) * (retain - self.eps)

    def after_step(self, retain: Tensor, retain_weight: float, epoch: int) -> Mapping[str, float]:
        """Update the dual variable; gives the one that the step used."""
        used = self.dual = self._dual(retain_weight)
        if epoch >= self.warmup_epochs:
            self.dual = max(0.0, used + self.step * (retain.item() - self.eps))
        return {"dual": used}

    def _dual(self, retain_weight: float) -> float:
        return retain_weight if self.dual is None else self.dual


def _flatness(logits: Tensor) -> Tensor:
    """Squared distance of the largest logit to the mean one: `(..., V)` to `(...)`."""
    return torch.square(logits.amax(dim=-1) - logits.mean(dim=-1))
