"""Frozen models beside the policy: a resident copy, or their answer log-probs alone where these suffice."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.logprobs import Rows, Scorer

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
    """A model that is only read; no submodule of the LightningModule, so in no optimizer and no checkpoint."""

    def __init__(self) -> None:
        self._resident: Scorer | None = None

    def scorer(self, load: Callable[[], Any], device: torch.device, keep: bool = True) -> Scorer:
        """Scorer of the model on a device.

        Args:
            load: Brings the model on first use.
            device: Where it is to run.
            keep: Whether the model stays in memory.
        """
        scorer = self._resident
        if scorer is None:
            scorer = Scorer(load().requires_grad_(False).eval().to(device))
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

    def __init__(self) -> None:
        super().__init__()
        self.totals: dict[str, Tensor] = {}
        self.identity = ""

    @torch.no_grad()
    def fill(self, batches: Iterable[Mapping[str, Rows]], rows: int, scorer: Scorer) -> None:
        """Score all training rows.

        Args:
            batches: Parts of the training rows with their `index` `(B,)`.
            rows: Number of training rows N.
            scorer: Of the reference, in eval mode.
        """
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, part in batch.items():
                total = scorer({name: part})[name].logps().total
                stored = totals.setdefault(name, torch.full((rows,), torch.nan))
                stored[part["index"].cpu()] = total.float().cpu()
        self.totals = totals

    def add_to(self, batch: Mapping[str, dict[str, Tensor]]) -> None:
        """Put the reference's log-probs `(B,)` into the parts of a training batch."""
        for name, stored in self.totals.items():
            if name in batch:
                index = batch[name]["index"]
                batch[name][REFERENCE_KEY] = stored[index.cpu()].to(index.device)
