"""Frozen models beside the policy: a resident copy, or their answer log-probs alone where these suffice."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.models.loading import frozen_copy
from simnpo_pl.models.logprobs import Rows, Scorer
from simnpo_pl.models.sharding import is_sharded, shard_like
from simnpo_pl.utils.errors import UserError

REFERENCE_KEY = "reference_logps"
"""Key under which a part of a batch brings the reference's summed answer log-probs, `(B,)` nats."""


def fingerprint(batches: Iterable[Mapping[str, Rows]]) -> str:
    """Identity of rows of tokens: hash of their ids and labels."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, part in sorted(batch.items()):
            digest.update(name.encode())
            for key in ("input_ids", "labels"):
                digest.update(part[key].cpu().numpy().tobytes())
    return digest.hexdigest()


class FrozenModel:
    """A model that is only read; no submodule of the LightningModule, so in no optimizer and no checkpoint.

    Args:
        name: Hub id or folder.
        option: Setting that names it, for messages.
        load: Gives the model, from its name and `option`, the setting for messages.
    """

    def __init__(self, name: str, option: str, load: Callable[..., Any]) -> None:
        self.name, self.option = name, option
        self._load = load
        self._resident: Scorer | None = None

    def free(self) -> None:
        """Drop the resident model."""
        self._resident = None

    def scorer(self, policy: Scorer, device: torch.device, keep: bool = True, same: bool = False) -> Scorer:
        """Scorer of the model on a device.

        Args:
            policy: Scorer of the policy.
            device: Where it is to run.
            keep: Whether the model stays in memory.
            same: Whether the policy has the model's weights at present, so that it is copied instead of read.

        Raises:
            UserError: The model cannot be loaded, or has another vocabulary than the policy.
        """
        scorer = self._resident
        if scorer is None:
            sharded = is_sharded(policy.model)
            if same and not sharded:
                model = frozen_copy(policy.model)
            else:
                model = self._load(self.name, option=self.option, sharded=sharded)
            model.requires_grad_(False).eval()
            if sharded:
                shard_like(model, policy.model)
            scorer = Scorer(model.to(device))
        if scorer.vocabulary != policy.vocabulary:
            raise UserError(
                f"{self.option}: {self.name} has {scorer.vocabulary} tokens in its vocabulary, the policy "
                f"{policy.vocabulary}; give a model of the same kind"
            )
        scorer.model.to(device)
        self._resident = scorer if keep else None
        return scorer


class Reference(FrozenModel):
    """What the policy is compared with.

    Attributes:
        totals: Part of the batch (`forget`, `alternate`) to the reference's summed answer log-probs of every
            forget row, `(N,)` nats, filled once before training. With these a step of NPO or DPO needs no second
            model and no second forward pass.
        identity: Which model and rows these are of.
    """

    def __init__(self, name: str, option: str, load: Callable[..., Any]) -> None:
        super().__init__(name, option, load)
        self.totals: dict[str, Tensor] = {}
        self.identity = ""

    @torch.no_grad()
    def fill(self, batches: Sequence[Mapping[str, Rows]], scorer: Scorer, device: Any, strategy: Any) -> None:
        """Score all training rows, each on one process.

        Args:
            batches: Parts of the training rows with their `index` `(B,)`; the same on every process.
            scorer: Of the reference, in eval mode.
            device: Where it runs.
            strategy: Of the Trainer; its processes share the batches.
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

    def add_to(self, batch: Mapping[str, dict[str, Tensor]]) -> None:
        """Put the reference's log-probs `(B,)` into the parts of a training batch."""
        for name, stored in self.totals.items():
            if name in batch:
                index = batch[name]["index"]
                batch[name][REFERENCE_KEY] = stored[index.cpu()].to(index.device)
