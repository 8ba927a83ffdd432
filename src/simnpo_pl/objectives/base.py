"""Forget and retain losses: their inputs and their averages.

`Inputs` and `ForgetInputs` are the one place where inputs are made: a new input is a new property there.
"""

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from simnpo_pl.data.tokenization import IGNORE_INDEX
from simnpo_pl.data.training import Batch, effective_mean
from simnpo_pl.models.logprobs import AnswerLogps, AnswerStates, Scorer, answer_lengths, score_together
from simnpo_pl.models.reference import REFERENCE_KEY
from simnpo_pl.utils.errors import UserError


class Models(NamedTuple):
    """Scorers of the policy and of the frozen models; None where nothing reads one."""

    policy: Scorer
    reference: Scorer | None = None
    memorizing: Scorer | None = None


class Positions(NamedTuple):
    """Every position of B rows padded to T tokens: questions, answers and padding."""

    logits: Tensor
    """`(B, T, V)` logits in float32."""
    labels: Tensor
    """`(B, T)` label of the token at each position, not of the one it predicts; -100 where not scored."""
    mask: Tensor
    """`(B, T)` 1 on a row's own tokens, 0 on padding."""


class Inputs:
    """What a loss may read of B rows with S scored tokens; each property is computed when first read.

    Args:
        batch: Parts of the batch with their rows.
        scored: Scored positions under the policy, by part, from one forward pass.
        models: What else is run.
        needs: The loss's own; a read of `states` or `positions` that it does not name raises `UserError`.
        values: Values of properties by name, to compute a loss without a model.
    """

    part: ClassVar[str]

    def __init__(
        self,
        batch: Batch | None = None,
        scored: Mapping[str, AnswerStates] | None = None,
        models: Models | None = None,
        needs: Collection[str] = ("states", "positions"),
        **values: Any,
    ) -> None:
        self._batch, self._scored, self._models, self._needs = batch or {}, dict(scored or {}), models, needs
        if "states" in values:
            self._scored[self.part] = values["states"]
        vars(self).update(values)

    @cached_property
    def states(self) -> AnswerStates:
        """Policy, every scored token of the answers, and hidden states of the loss's `layer`."""
        self._require("states", "states" in self._needs)
        return self._scored[self.part]

    @cached_property
    def reference_states(self) -> AnswerStates:
        """Reference, the same tokens, without gradient; see `AnswerStates.per_token`."""
        return self._frozen("reference", self.part)

    @cached_property
    def memorizing_states(self) -> AnswerStates:
        """Memorizing model, the same tokens, without gradient."""
        return self._frozen("memorizing", self.part)

    @cached_property
    def positions(self) -> Positions:
        """Policy, every position of the rows."""
        self._require("positions", "positions" in self._needs)
        rows = self._batch[self.part]
        return Positions(self._scorer("policy").all_logits(rows), rows["labels"], rows["attention_mask"])

    @cached_property
    def reference_positions(self) -> Tensor:
        """`(B, T, V)` reference, logits at these positions."""
        with torch.no_grad():
            return self._scorer("reference").all_logits(self._batch[self.part])

    def _logps(self, part: str) -> AnswerLogps:
        self._require(part, part in self._scored)
        return self._scored[part].logps()

    def _require(self, name: str, there: bool) -> None:
        if not there:
            raise UserError(f"the loss of the {self.part} rows reads {name}, which its `needs` must name")

    @torch.no_grad()
    def _frozen(self, model: str, part: str) -> AnswerStates:
        layers = self._scored[part].layers if part in self._scored else ()
        return self._scorer(model)({part: self._batch[part]}, list(layers))[part]

    def _scorer(self, model: str) -> Scorer:
        scorer: Scorer = getattr(self._models, model)
        self._require(f"the {model} model", scorer is not None)
        return scorer


class ForgetInputs(Inputs):
    """What an objective may read.

    Example:
        >>> from simnpo_pl.objectives import SimNPO
        >>> logps = AnswerLogps(total=torch.tensor([-6.0]), length=torch.tensor([3.0]))
        >>> SimNPO(beta=1.0)(ForgetInputs(forget=logps)) > 0
        tensor([True])
    """

    part = "forget"

    @cached_property
    def forget(self) -> AnswerLogps:
        """Policy, forget answers."""
        return self._logps("forget")

    @cached_property
    def alternate(self) -> AnswerLogps:
        """Policy, refusals instead of the forget answers."""
        return self._logps("alternate")

    @cached_property
    def sampled(self) -> AnswerLogps:
        """Policy, answers that the start model gave instead of the forget answers."""
        return self._logps("sampled")

    @cached_property
    def alternate_tokens(self) -> Tensor:
        """`(S,)` the refusal's tokens, without its end, repeated to the length of each forget answer."""
        alternate, states = self._batch["alternate"], self.states
        scored = alternate["labels"] != IGNORE_INDEX
        counts = (scored.sum(dim=1) - alternate.get("end", 0)).clamp(min=1)
        lengths = states.lengths().long()
        place = torch.arange(len(states.rows), device=lengths.device) - (lengths.cumsum(0) - lengths)[states.rows]
        first = scored.int().argmax(dim=1)
        return alternate["labels"][states.rows, first[states.rows] + place % counts[states.rows]]

    @cached_property
    def reference_forget(self) -> Tensor:
        """`(B,)` reference, forget answers: sum of log-probs, nats."""
        return self._reference_total("forget")

    @cached_property
    def reference_alternate(self) -> Tensor:
        """`(B,)` reference, refusals: sum of log-probs, nats."""
        return self._reference_total("alternate")

    @cached_property
    def reference_sampled(self) -> Tensor:
        """`(B,)` reference, the start model's answers: sum of log-probs, nats."""
        return self._reference_total("sampled")

    def _reference_total(self, part: str) -> Tensor:
        """From the batch, where the log-probs were computed before training; else from the model."""
        rows = self._batch[part]
        return rows[REFERENCE_KEY] if REFERENCE_KEY in rows else self._frozen("reference", part).logps().total


class RetainInputs(Inputs):
    """What a retain loss may read."""

    part = "retain"

    @cached_property
    def retain(self) -> AnswerLogps:
        """Policy, retain answers."""
        return self._logps("retain")


class Loss(nn.Module):
    """What objectives and retain losses have in common: what they read, and how their rows are averaged."""

    parts: tuple[str, ...]
    """Parts of a training batch that it reads."""
    needs: frozenset[str] = frozenset()
    """What must be known before a batch is run: those of `known_needs` that it reads, or that what it reads is computed
    from; `reference` for `reference_forget`, `reference_alternate` and `reference_sampled`."""
    known_needs: ClassVar[tuple[str, ...]] = ("states", "reference_states", "positions", "reference_positions")
    mean_over: Literal["examples", "tokens"] = "examples"
    """`tokens`: a row's loss is a mean over its scored tokens and is weighted by their number."""
    layer: int | None = None
    """Layer, from 0, whose hidden states it reads as `states.layers[layer]`."""
    skipped_tokens: ClassVar[int] = 0
    """Scored tokens at the start of every answer that a mean over tokens leaves out."""

    def forward(self, inputs: Any) -> Tensor:
        raise TypeError(f"{type(self).__name__} must implement forward(inputs) -> Tensor (B,)")

    @property
    def scored_parts(self) -> tuple[str, ...]:
        """Parts whose answers the policy scores."""
        needs = self.needs | {self.parts[0]} if "states" in self.needs else self.needs
        return tuple(part for part in self.parts if part in needs)

    def runs(self, model: Literal["reference", "memorizing"]) -> bool:
        """Whether every step runs this model."""
        return any(name.startswith(f"{model}_") for name in self.needs)

    @property
    def reads_logits(self) -> bool:
        """Whether it reads whole distributions and not only the labels' log-probs or hidden states."""
        return "positions" in self.needs or ("states" in self.needs and self.layer is None)

    def effective_mean(self, per_row: Tensor, batch: Batch) -> Tensor:
        """This batch's share of the mean of per-row losses `(B,)` over the effective batch."""
        part = batch[(*self.scored_parts, *self.parts)[0]]
        lengths = answer_lengths(part) if self.mean_over == "tokens" else None
        return effective_mean(per_row, part, lengths, self.skipped_tokens)


class RetainLoss(Loss):
    """Base of all retain losses; subclasses implement `forward(inputs: RetainInputs) -> Tensor`: each row's, `(B,)`."""

    parts = ("retain",)
    known_needs = ("retain", *Loss.known_needs)
    mean_over: Literal["examples", "tokens"] = "tokens"


class Objective(Loss):
    """Base of all forget objectives; subclasses implement `forward`.

    `forward(inputs: ForgetInputs) -> Tensor` gives the loss of each row, `(B,)`, which is minimized.
    """

    needs = frozenset({"forget"})
    known_needs = (
        *("forget", "alternate", "sampled", "reference", "alternate_tokens", "memorizing_states"),
        *Loss.known_needs,
    )
    needs_retain: ClassVar[bool] = False
    """Whether it requires a retain loss."""
    checkpointed: ClassVar[tuple[str, ...]] = ()
    """Attributes that change over training and are saved in the checkpoint: plain numbers."""
    default_forget_weight: ClassVar[float] = 1.0
    """Coefficient of the forget loss where the user gives none."""
    default_retain_weight: ClassVar[float] = 1.0
    """Coefficient of the retain loss where the user gives none; 0 drops the retain term."""
    default_trainable: tuple[str, ...] = ()
    """Regular expressions of the parameters to train where the user gives none; empty trains all."""

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        """Always contains `forget`: an epoch is one pass over it."""
        read = (part for part in ("alternate", "sampled") if any(name.startswith(part) for name in self.needs))
        return ("forget", *read)

    @property
    def caches_reference(self) -> bool:
        """Whether it reads the reference's summed log-probs, which need no model once they are known."""
        return "reference" in self.needs

    def total(self, forget: Tensor, retain: Tensor, forget_weight: float, retain_weight: float) -> Tensor:
        """What is minimized, from the two losses (scalars; retain is 0 without one) and the user's coefficients."""
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

    def gradient_weights(self, inputs: ForgetInputs, losses: Tensor) -> Tensor | None:
        """Derivative of each row's loss with respect to the summed log-prob of its forget answer.

        The gradient of a row's loss is this number times the gradient of `inputs.forget.total`, where the loss reads
        the answer through that sum: W of NPO and W' of SimNPO (SimNPO paper, section 4). No model is run.

        Args:
            inputs: What `forward` read.
            losses: What `forward` gave, `(B,)`.

        Returns:
            `(B,)`, per nat of the summed log-prob. Negative: a step makes the answer more likely; 0: the loss has no
            gradient with respect to it. None for an objective that reads only refusals or single tokens.
        """
        if not {"forget"} <= self.needs <= {"forget", "alternate", "sampled", "reference"}:
            return None
        total = inputs.forget.total
        if not losses.requires_grad:
            return torch.zeros_like(total)
        # Training differentiates the same graph afterwards.
        return torch.autograd.grad(losses.sum(), total, retain_graph=True, materialize_grads=True)[0]


class StepLosses(NamedTuple):
    """Losses of a batch, scalars, not yet multiplied by their weights; the retain loss is 0 where there is none."""

    forget: Tensor
    retain: Tensor
    scores: dict[str, Tensor]
    """Of the forget answers, each `(B,)`: `weight`, see `Objective.gradient_weights`; `logp`, summed, nats; `length`,
    tokens. Empty where the objective has no such weight."""


def batch_losses(objective: Objective, retain_loss: RetainLoss | None, batch: Batch, models: Models) -> StepLosses:
    """Losses of a batch, see `UnlearningModule.losses`; the policy scores all its rows in one forward pass."""
    losses: list[Loss] = [objective, *([] if retain_loss is None else [retain_loss])]
    rows = {part: batch[part] for loss in losses for part in loss.scored_parts}
    needs = frozenset[str]().union(*(loss.needs for loss in losses))
    layers = {loss.layer for loss in losses if loss.layer is not None}
    scored = score_together(models.policy(rows, layers), [part for part in rows if part in needs]) if rows else {}
    inputs = ForgetInputs(batch, scored, models, objective.needs)
    per_row = objective(inputs)
    scores: dict[str, Tensor] = {}
    if (weights := objective.gradient_weights(inputs, per_row)) is not None:
        scores = {"weight": weights, "logp": inputs.forget.total.detach(), "length": inputs.forget.length}
    forget = objective.effective_mean(per_row, batch)
    if retain_loss is None:
        return StepLosses(forget, forget.new_zeros(()), scores)
    kept = retain_loss(RetainInputs(batch, scored, models, retain_loss.needs))
    return StepLosses(forget, retain_loss.effective_mean(kept, batch), scores)


def row_means(states: AnswerStates, values: Tensor, skipped: int = 0) -> Tensor:
    """Means `(B,)` of token values `(S,)` within rows, of which `skipped` tokens are left out."""
    return states.sum_rows(values) / (states.lengths() - skipped).clamp(min=1)
