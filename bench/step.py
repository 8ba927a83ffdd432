"""One training step, forward and backward: the public recipe, the package's ways, the bare body."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import baseline
from bench.data import Batch, freeze
from simnpo_pl.models import head
from simnpo_pl.models.logprobs import Scorer, join
from simnpo_pl.models.lora import BaseScorer, LoraOptions, add_adapter
from simnpo_pl.models.packing import layout_of, packed_hidden
from simnpo_pl.models.reference import REFERENCE_KEY
from simnpo_pl.objectives import NPO, Models, SimNPO
from simnpo_pl.objectives.base import batch_losses
from simnpo_pl.objectives.retain import KL, NLL

METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., torch.Tensor]]] = {
    "NPO": (NPO, NLL, baseline.npo),
    "NPO+KL": (NPO, KL, baseline.npo_kl),
    "SimNPO": (partial(SimNPO, beta=2.5), NLL, baseline.simnpo),
}
LEAN = {name: partial(METHODS[name][2], of=baseline.lean_row_losses) for name in ("NPO", "SimNPO")}
"""The public recipe as it might be written with care: no loss that nobody reads, no copy of the logits."""
WAYS = ("packed", "chunked", "padded", "whole", "checkpointed", "bf16", "lora")
"""How the package runs a step: packed is its default; chunked makes logits again in the backward pass; padded and
whole are for models that cannot pack; checkpointed makes activations again; bf16 is autocast; lora trains adapters."""


@dataclass(frozen=True)
class Variant:
    """One way to make a step.

    Args:
        method: Key of `METHODS`.
        way: `public` for the plain recipe, `lean` for it without needless work, `body` for the bare transformer body,
            or one of `WAYS`.
    """

    method: str
    way: str

    def __str__(self) -> str:
        return f"{self.method} {self.way}"

    @property
    def holds_reference(self) -> bool:
        """Whether a second model stays in memory."""
        if self.way == "lora" or self.way == "body":
            return False
        return self.method == "NPO+KL" or (self.way in ("public", "lean") and self.method == "NPO")


class Step:
    """A variant ready to run on its own model.

    Args:
        variant: What to run.
        model: Policy; kept by the variant.
        reference: Frozen model, where the variant holds one.
        forget: Rows to forget; the package's ways find the reference's log-probs with them.
        retain: Rows to retain.
    """

    def __init__(self, variant: Variant, model: Any, reference: Any, forget: Batch, retain: Batch) -> None:
        self.variant, self.model, self.rows = variant, model.train(), {"forget": dict(forget), "retain": dict(retain)}
        self.loss = self._public(reference) if variant.way in ("public", "lean") else self._own(reference)

    def __call__(self) -> torch.Tensor:
        """Loss and gradients of one step."""
        budget = head.LOGITS_BUDGET
        try:
            if self.variant.way == "chunked":
                head.LOGITS_BUDGET = 0
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.variant.way == "bf16"):
                loss = self.loss()
            loss.backward()
        finally:
            head.LOGITS_BUDGET = budget
            # Variants that wait for their turn hold no gradients.
            self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def _public(self, reference: Any) -> Callable[[], torch.Tensor]:
        method = self.variant.method
        recipe = METHODS[method][2] if self.variant.way == "public" else LEAN[method]
        return lambda: recipe(self.model, reference, self.rows["forget"], self.rows["retain"])

    def _own(self, reference: Any) -> Callable[[], torch.Tensor]:
        way = self.variant.way
        if way == "checkpointed":
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        scorer = Scorer(self.model)
        if way in ("padded", "whole"):
            scorer.forward.way = "padded"
        if way == "whole":
            scorer.forward.reads_logits = True
            scorer.head = scorer.forward.head = head.Head(torch.nn.Identity(), scorer.head.vocabulary)
        if way == "body":
            return self._body
        objective, retain_loss, _ = METHODS[self.variant.method]
        with torch.no_grad():
            self.rows["forget"][REFERENCE_KEY] = scorer({"forget": self.rows["forget"]})["forget"].logps().total
        if way == "lora":
            add_adapter(self.model, LoraOptions())
            other: Any = BaseScorer(scorer)
        else:
            other = None if reference is None else Scorer(reference)
        both, models = (objective(), retain_loss()), Models(scorer, other)

        def total() -> torch.Tensor:
            losses = batch_losses(*both, self.rows, models)
            return losses.forget + losses.retain

        return total

    def _body(self) -> torch.Tensor:
        """The transformer body alone on exactly the real tokens: what no way of unlearning can do without."""
        rows = join(list(self.rows.values()))
        layout = layout_of(rows["input_ids"], rows["attention_mask"])
        return packed_hidden(self.model.base_model, rows["input_ids"], layout).float().mean()


def steps(variants: Sequence[Variant], model: Any, forget: Batch, retain: Batch) -> dict[str, Step]:
    """Every variant on a copy of one model."""
    made = {}
    for variant in variants:
        reference = freeze(copy.deepcopy(model)) if variant.holds_reference else None
        made[str(variant)] = Step(variant, copy.deepcopy(model), reference, forget, retain)
    return made
