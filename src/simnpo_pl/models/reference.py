"""Frozen models: a resident copy, or only their answer log-probs where these are enough."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.models.logprobs import Rows, Scorer
from simnpo_pl.models.sharding import is_sharded, shard
from simnpo_pl.utils.errors import UserError

REFERENCE_KEY = "reference_logps"
"""Key under which a part of a batch brings the reference's summed answer log-probs, `(B,)` nats."""


class FrozenModel:
    """A model that is only read; no submodule of the LightningModule, so in no optimizer and no checkpoint.

    `option` is the setting that names it, for messages; `load` loads it from its name and `option`.
    """

    def __init__(self, name: str, option: str, load: Callable[..., Any]) -> None:
        self.name, self.option = name, option
        self._load = load
        self._resident: Scorer | None = None

    def free(self) -> None:
        self._resident = None

    def scorer(self, policy: Scorer, device: torch.device, keep: bool = True) -> Scorer:
        """Scorer of the model, which must have the policy's vocabulary, on a device; `keep` leaves it in memory."""
        scorer = self._resident
        if scorer is None:
            sharded = is_sharded(policy.model)
            model = self._load(self.name, option=self.option, sharded=sharded).requires_grad_(False).eval()
            if sharded:
                shard(model, policy.model.mesh)
            scorer = Scorer(model.to(device))
        ours, theirs = scorer.head.vocabulary, policy.head.vocabulary
        if ours != theirs:
            raise UserError(
                f"{self.option}: {self.name} has {ours} tokens in its vocabulary, the policy {theirs}; give a model "
                "of the same kind"
            )
        self._resident = scorer if keep else None
        return scorer


class Reference(FrozenModel):
    """The frozen model that the policy is compared with.

    Attributes:
        totals: Part of the batch (`forget`, `alternate`, `sampled`) to the reference's summed answer log-probs of every
            forget row, `(N,)` nats, computed once before training. With these a step of NPO or DPO needs no second
            model and no second forward pass.
        identity: The model and the rows of these.
    """

    def __init__(self, name: str, option: str, load: Callable[..., Any]) -> None:
        super().__init__(name, option, load)
        self.totals: dict[str, Tensor] = {}
        self.identity = ""

    def identity_of(self, batches: Sequence[Mapping[str, Rows]]) -> str:
        """Of this model and the tokens of these rows: log-probs of another model or of other rows would be wrong."""
        digest = hashlib.sha256()
        for batch in batches:
            for name, part in sorted(batch.items()):
                digest.update(name.encode())
                for key in ("input_ids", "labels"):
                    digest.update(part[key].cpu().numpy().tobytes())
        return f"{self.name} {digest.hexdigest()}"

    @torch.no_grad()
    def fill(self, batches: Sequence[Mapping[str, Rows]], scorer: Scorer, device: Any, strategy: Any) -> None:
        """Score all training rows, each on one process, with the reference in eval mode.

        `batches` have parts with their `index` `(B,)` and are the same on every process of the Trainer's `strategy`.
        """
        rank, world = strategy.global_rank, strategy.world_size
        rows = 1 + max(int(part["index"].max()) for batch in batches for part in batch.values())
        # Some strategies have bfloat16 as the default type within a step.
        totals = {name: torch.zeros(rows, dtype=torch.float32, device=device) for batch in batches for name in batch}
        for turn in range(0, len(batches), world):
            # Every process runs equally many, since those of a sharded model wait for each other.
            number = turn + rank
            for name, part in batches[number % len(batches)].items():
                part = {key: value.to(device) for key, value in part.items()}
                total = scorer({name: part})[name].logps().total
                if number < len(batches):
                    totals[name][part["index"]] = total.float()
        self.totals = {name: strategy.reduce(total, reduce_op="sum").cpu() for name, total in totals.items()}
        self.identity = self.identity_of(batches)

    def add_to(self, batch: Mapping[str, dict[str, Tensor]]) -> None:
        """Put the reference's log-probs `(B,)` into the parts of a training batch."""
        for name in self.totals.keys() & batch.keys():
            index = batch[name]["index"]
            # All of them go to the device: to choose there needs no wait for it.
            batch[name][REFERENCE_KEY] = self.totals[name].to(index.device, non_blocking=True)[index]

    def state_dict(self) -> dict[str, Any]:
        return {"totals": self.totals, "identity": self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.totals, self.identity = state["totals"], state["identity"]
