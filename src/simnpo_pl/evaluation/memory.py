"""Splits a batch that is out of memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from simnpo_pl.models.logprobs import PLAN

Batch = dict[str, Any]


class Halves:
    """Runs a batch; after a failure for lack of memory, splits every batch at least that large.

    Args:
        run: Gives the outcome of a batch: lists of token ids, one a row, or scores `(B,)` by name.
    """

    def __init__(self, run: Callable[[Batch], Any]) -> None:
        self.run = run
        self.too_large: dict[bool, int] = {}

    def __call__(self, batch: Batch) -> Any:
        """The batch's outcome.

        Raises:
            RuntimeError: Not even one row fits, or another error occurred.
        """
        kind, rows, size = "prompts" in batch, len(batch["index"]), _size(batch)
        if rows == 1 or size < self.too_large.get(kind, size + 1):
            try:
                return self.run(batch)
            except (RuntimeError, MemoryError) as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
            # Here the error is gone, and with it the tensors that it held.
            what = "prompts" if kind else "answers"
            rank_zero_warn(f"out of memory with {rows} {what} at once: continuing with half as many")
            self.too_large[kind] = size
            garbage_collection_cuda()
        return _join([self(half) for half in _halves(batch)])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the system had no memory left."""
    # A CPU has no error class of its own for it.
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _size(batch: Batch) -> int:
    """Tokens with padding."""
    if "prompts" in batch:
        return len(batch["prompts"]) * (max(map(len, batch["prompts"])) + batch["max_new_tokens"])
    return batch["input_ids"].numel()


def _halves(batch: Batch) -> list[Batch]:
    rows = len(batch["index"])
    middle = (rows + 1) // 2
    by_row = {key for key, value in batch.items() if isinstance(value, torch.Tensor | list) and len(value) == rows}
    return [
        {key: value[part] if key in by_row else value for key, value in batch.items() if key != PLAN}
        for part in (slice(middle), slice(middle, rows))
    ]


def _join(found: list[Any]) -> Any:
    if not isinstance(found[0], Mapping):
        return [row for half in found for row in half]
    names = dict.fromkeys(name for half in found for name in half)
    # A score that no row of a half reads is missing there.
    missing = [torch.full_like(next(iter(half.values())), torch.nan) for half in found]
    return {name: torch.cat([half.get(name, nan) for half, nan in zip(found, missing, strict=True)]) for name in names}
