"""From a batch to its forget loss and its retain loss.

Runs the models whose outputs objective and retain loss declare, and averages their rows over the effective batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.models.layers import check_layer
from simnpo_pl.models.logprobs import AnswerStates, Scorer, answer_lengths, score_together
from simnpo_pl.models.reference import REFERENCE_KEY
from simnpo_pl.objectives import ForgetInputs, Objective, Positions
from simnpo_pl.objectives.retain import RetainLoss

Rows = dict[str, Tensor]
Batch = Mapping[str, Rows]


class BatchLosses:
    """Forget and retain loss of a batch; names no objective.

    Args:
        objective: Says in `needs` what it reads.
        retain_loss: None where nothing is retained.
        policy: Gives the scorer of the policy.
        reference: Gives the scorer of the frozen reference; called only where something reads it.
        memorising: The same of the memorising model.

    Attributes:
        forget_scores: Of the newest batch's forget answers, each `(B,)`: `weight`, see `Objective.gradient_weights`;
            `logp`, summed, nats; `length`, tokens. Empty where the objective has no such weight.
    """

    def __init__(
        self,
        objective: Objective,
        retain_loss: RetainLoss | None,
        policy: Callable[[], Scorer],
        reference: Callable[[], Scorer],
        memorising: Callable[[], Scorer],
    ) -> None:
        self.objective = objective
        self.retain_loss = retain_loss
        self.policy = policy
        self.reference = reference
        self.memorising = memorising
        self.forget_scores: dict[str, Tensor] = {}

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts a training batch must have, such as forget and retain."""
        # The forget rows set the epoch even where only their refusals are scored.
        alternate = ("alternate",) if "alternate" in self.objective.needs else ()
        return ("forget", *alternate, *(("retain",) if self.retain_loss is not None else ()))

    @property
    def scored_parts(self) -> list[str]:
        """Parts of which the policy scores the answers for the objective."""
        needs = self.objective.needs
        forget = ["forget"] if needs & {"forget", "states", "layer"} else []
        return [*forget, *(["alternate"] if "alternate" in needs else [])]

    @property
    def caches_reference(self) -> bool:
        """Whether the objective reads the reference's summed log-probs, which need no model once they are known."""
        return "reference" in self.objective.needs

    @property
    def keeps_reference(self) -> bool:
        """Whether every step runs the reference model."""
        retains = self.retain_loss is not None and self.retain_loss.needs_reference
        return retains or bool(self.objective.needs & {"reference_states", "reference_positions"})

    @property
    def reads_reference(self) -> bool:
        """Whether anything reads the reference at all."""
        return self.caches_reference or self.keeps_reference

    @property
    def reads_memorising(self) -> bool:
        """Whether every step runs the memorising model."""
        return "memorising_states" in self.objective.needs

    @property
    def reads_logits(self) -> bool:
        """Whether a loss reads whole distributions, not the labels' log-probs alone."""
        retain = self.retain_loss
        whole = retain is not None and not retain.reads_logps and retain.layer is None
        return whole or bool(self.objective.needs & {"states", "positions"})

    def check_layers(self, model: Any) -> None:
        """See that the policy has the layers whose hidden states something reads.

        Raises:
            UserError: It has not.
        """
        for option, reader in (("objective", self.objective), ("retain_loss", self.retain_loss)):
            if reader is not None and reader.layer is not None:
                check_layer(model, reader.layer, f"--model.{option}.layer")

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Forget and retain loss, scalars before their weights; see `UnlearningModule.losses`."""
        rows = {name: batch[name] for name in self.scored_parts}
        if self.retain_loss is not None and not self.retain_loss.every_position:
            rows["retain"] = batch["retain"]
        readers = (self.objective, self.retain_loss)
        layers = {reader.layer for reader in readers if reader is not None and reader.layer is not None}
        # One forward pass for all of them.
        states = score_together(self.policy()(rows, layers), self._logps_of(rows)) if rows else {}
        inputs = self._inputs(batch, states)
        per_row = self.objective(inputs)
        weights = self.objective.gradient_weights(inputs, per_row)
        if weights is not None and inputs.forget is not None:
            logp = inputs.forget.total.detach()
            self.forget_scores = {"weight": weights, "logp": logp, "length": inputs.forget.length}
        counted = batch[(self.scored_parts or ["forget"])[0]]
        forget_loss = _average(per_row, counted, self.objective.mean_over, self.objective.skipped_tokens)
        return forget_loss, self._retain(batch, states, per_row)

    def _logps_of(self, rows: Batch) -> list[str]:
        """Parts of the policy's rows whose log-probs are read."""
        read = {
            *self.objective.needs,
            *(["retain"] if self.retain_loss is not None and self.retain_loss.reads_logps else []),
        }
        return [name for name in rows if name in read]

    def _inputs(self, batch: Batch, states: Mapping[str, AnswerStates]) -> ForgetInputs:
        needs, forget, layer = self.objective.needs, batch["forget"], self.objective.layer
        logps = {name: states[name].logps() for name in ("forget", "alternate") if name in needs}
        totals = {name: self.reference_totals(name, batch[name]) for name in logps if self.caches_reference}
        positions = reference_positions = None
        if "positions" in needs:
            positions = Positions(self.policy().all_logits(forget), forget["labels"], forget["attention_mask"])
        with torch.no_grad():
            if "reference_positions" in needs:
                reference_positions = self.reference().all_logits(forget)
            frozen = {"reference_states": self.reference, "memorising_states": self.memorising}
            others = {n: scorer()({"forget": forget})["forget"] for n, scorer in frozen.items() if n in needs}
        return ForgetInputs(
            forget=logps.get("forget"),
            alternate=logps.get("alternate"),
            reference_forget=totals.get("forget"),
            reference_alternate=totals.get("alternate"),
            states=states["forget"] if "states" in needs else None,
            layer=states["forget"].layers[layer] if "layer" in needs and layer is not None else None,
            reference_states=others.get("reference_states"),
            memorising_states=others.get("memorising_states"),
            positions=positions,
            reference_positions=reference_positions,
        )

    @torch.no_grad()
    def reference_totals(self, name: str, rows: Rows) -> Tensor:
        """`(B,)` summed answer log-probs under the reference, nats: those the rows bring, else of the model."""
        if REFERENCE_KEY in rows:
            return rows[REFERENCE_KEY]
        return self.reference()({name: rows})[name].logps().total

    def _retain(self, batch: Batch, states: Mapping[str, AnswerStates], like: Tensor) -> Tensor:
        loss = self.retain_loss
        if loss is None:
            return like.new_zeros(())
        rows = batch["retain"]
        if loss.every_position:
            per_row = loss.over_all_positions(rows, self.policy(), self.reference())
        else:
            reference = None
            if loss.needs_reference:
                layers = [] if loss.layer is None else [loss.layer]
                with torch.no_grad():
                    reference = self.reference()({"retain": rows}, layers)["retain"]
            per_row = loss(states["retain"], reference)
        return _average(per_row, rows, loss.mean_over)


def _average(per_row: Tensor, rows: Mapping[str, Tensor], over: str, skipped: int = 0) -> Tensor:
    """Mean of per-row losses `(B,)` over examples or tokens, within the effective batch the rows belong to.

    Args:
        per_row: Loss of each row.
        rows: A part of a batch; alone, or with `weight`, `step_rows` and `step_tokens`, see `TrainingSet`.
        over: `examples` or `tokens`.
        skipped: Scored tokens of each row that the loss leaves out.
    """
    weights = rows["weight"] if "weight" in rows else torch.ones_like(per_row)
    count = rows["step_rows"] if "step_rows" in rows else weights.sum()
    if over == "examples":
        return (per_row * weights).sum() / count
    lengths = answer_lengths(rows)
    tokens = rows["step_tokens"] if "step_tokens" in rows else lengths.sum()
    return (per_row * weights * (lengths - skipped)).sum() / (tokens - skipped * count).clamp(min=1)
