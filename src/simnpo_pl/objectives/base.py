"""What an objective is: from scored answers to one loss per forget row.

It knows no model, tokenizer or data. It states in `needs` what it reads and in `mean_over` how rows are averaged.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from simnpo_pl.models.logprobs import AnswerLogps, AnswerStates, LayerStates
from simnpo_pl.utils.errors import UserError

T = TypeVar("T")
Need = Literal[
    "forget",
    "alternate",
    "reference",
    "states",
    "reference_states",
    "memorising_states",
    "layer",
    "positions",
    "reference_positions",
]


class Positions(NamedTuple):
    """Every position of B rows padded to T tokens: questions, answers and padding."""

    logits: Tensor
    """`(B, T, V)` logits in float32."""
    labels: Tensor
    """`(B, T)` label of the token at each position, not of the one it predicts; -100 where not scored."""
    mask: Tensor
    """`(B, T)` 1 on a row's own tokens, 0 on padding."""


class ForgetInputs(NamedTuple):
    """What an objective may read of a forget batch of B rows with S scored tokens; None where it did not ask for it."""

    forget: AnswerLogps | None = None
    """Policy, forget answers."""
    alternate: AnswerLogps | None = None
    """Policy, refusals in place of the forget answers."""
    reference_forget: Tensor | None = None
    """`(B,)` reference, forget answers: sum of log-probs, nats."""
    reference_alternate: Tensor | None = None
    """`(B,)` reference, refusals: sum of log-probs, nats."""
    states: AnswerStates | None = None
    """Policy, every scored token of the forget answers."""
    reference_states: AnswerStates | None = None
    """Reference, the same tokens, without gradient; see `AnswerStates.per_token`."""
    memorising_states: AnswerStates | None = None
    """Memorising model, likewise."""
    layer: LayerStates | None = None
    """Policy, hidden states of the objective's `layer` at the tokens of the forget answers."""
    positions: Positions | None = None
    """Policy, every position of the forget rows."""
    reference_positions: Tensor | None = None
    """`(B, T, V)` reference, logits at these positions."""


class Objective(nn.Module):
    """Base of all forget objectives; subclasses implement `forward`.

    `forward(inputs: ForgetInputs) -> Tensor` gives the loss of each row, `(B,)`, which is minimised.
    """

    needs: frozenset[Need] = frozenset({"forget"})
    """Fields of `ForgetInputs` it reads; `reference` gives those of the reference beside `forget` and `alternate`."""
    mean_over: Literal["examples", "tokens"] = "examples"
    """`tokens`: a row's loss is a mean over its scored tokens and counts as often as it has tokens."""
    layer: int | None = None
    """Number of the layer, from 0, whose hidden states it reads; goes with `layer` among its needs."""
    skipped_tokens: ClassVar[int] = 0
    """Scored tokens at the start of every answer that a mean over tokens leaves out."""
    needs_retain: ClassVar[bool] = False
    """Whether it cannot do without a retain loss."""
    carried: ClassVar[tuple[str, ...]] = ()
    """Attributes that change over training and are kept in the checkpoint: plain numbers."""
    default_forget_weight: ClassVar[float] = 1.0
    """Coefficient of the forget loss where the user names none."""
    default_retain_weight: ClassVar[float] = 1.0
    """Coefficient of the retain loss where the user names none; 0 drops the retain term."""

    @property
    def default_trainable(self) -> tuple[str, ...]:
        """Regular expressions of the parameters to train where the user names none; empty trains all."""
        return ()

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Loss of each row, `(B,)`."""
        raise TypeError(f"{type(self).__name__} must implement forward(inputs) -> Tensor (B,)")

    def total(self, forget: Tensor, retain: Tensor, forget_weight: float, retain_weight: float) -> Tensor:
        """What is minimised.

        Args:
            forget: Forget loss, a scalar.
            retain: Retain loss, a scalar; 0 without one.
            forget_weight: The user's coefficient.
            retain_weight: The user's coefficient.
        """
        return forget_weight * forget + retain_weight * retain

    def after_step(self, retain: Tensor, retain_weight: float, epoch: int) -> Mapping[str, float]:
        """Called once per optimizer step, on every process with the same values.

        Args:
            retain: Retain loss of the whole effective batch, a scalar.
            retain_weight: The user's coefficient.
            epoch: Number of the epoch, from 0.

        Returns:
            Values to log, by name.
        """
        return {}

    def gradient_weights(self, inputs: ForgetInputs, losses: Tensor | None = None) -> Tensor | None:
        """How strongly each forget answer is pushed down: the derivative of a row's loss by the answer's log-prob.

        The gradient of a row's loss is this number times the gradient of `inputs.forget.total`, where the loss reads
        the answer through that sum: W of NPO and W' of SimNPO (SimNPO paper, section 4). The model is not run again.

        Args:
            inputs: What `forward` reads.
            losses: What `forward` made of them, `(B,)`; None runs it.

        Returns:
            `(B,)`, per nat of the summed log-prob, below 0 where the answer is pushed up, 0 where the loss has no
            gradient by it; None for an objective that reads refusals alone or single tokens.
        """
        if inputs.forget is None or not self.needs <= {"forget", "alternate", "reference"}:
            return None
        total = inputs.forget.total
        with torch.enable_grad():
            if losses is None or not total.requires_grad:
                total = total.detach().requires_grad_()
                losses = self(inputs._replace(forget=inputs.forget._replace(total=total)))
            if not losses.requires_grad:
                return torch.zeros_like(total)
            # The graph stays: training goes back through it.
            return torch.autograd.grad(losses.sum(), total, retain_graph=True, materialize_grads=True)[0]


def positive(name: str, value: float) -> float:
    """A hyper-parameter that must be above 0.

    Raises:
        UserError: It is not, or is not finite.
    """
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"--model.objective.{name} must be a number above 0, got {value}: the usual range is 0.05 to 10"
        )
    return value


def not_negative(name: str, value: float) -> float:
    """A hyper-parameter that must be at least 0.

    Raises:
        UserError: It is not, or is not finite.
    """
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"--model.objective.{name} must be a number of at least 0, got {value}")
    return value


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """A setting that must be one of a few words.

    Raises:
        UserError: It is none of them.
    """
    if value not in known:
        raise UserError(f"--model.{option} must be {' or '.join(known)}, got {value!r}")
    return value


def given(value: T | None) -> T:
    """An input that the objective asked for."""
    assert value is not None, "an objective read what its `needs` does not name"
    return value


def row_means(states: AnswerStates, values: Tensor, skipped: int = 0) -> Tensor:
    """Means `(B,)` of token values `(S,)` within rows of which `skipped` tokens are left out."""
    return states.sum_rows(values) / (states.lengths() - skipped).clamp(min=1)
