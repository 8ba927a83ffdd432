"""Batches that do not fit into memory are run in halves."""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

Batch = dict[str, Any]


class Halves:
    """Runs batches, in two halves where one does not fit, and from then on none as large as that.

    Args:
        run: Gives of a batch what it found: lists of token ids, one a row, or scores `(B,)` by name.
    """

    def __init__(self, run: Callable[[Batch], Any]) -> None:
        self.run = run
        self.too_large: dict[bool, int] = {}

    def __call__(self, batch: Batch) -> Any:
        """What a batch found.

        Raises:
            RuntimeError: Not even one row fits, or something else went wrong.
        """
        kind, rows, size = "prompts" in batch, len(batch["index"]), _size(batch)
        if rows == 1 or size < self.too_large.get(kind, size + 1):
            try:
                return self.run(batch)
            except (RuntimeError, MemoryError) as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
            # Here the error is gone, and with it what it held.
            what = "prompts" if kind else "answers"
            rank_zero_warn(f"out of memory with {rows} {what} at once: going on with half as many")
            self.too_large[kind] = size
            free()
        return _join([(half, self(half)) for half in _split(batch)])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, or the system, had no memory left to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # A CPU has no error of its own for it.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def free() -> None:
    """Give back what is not used any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _size(batch: Batch) -> int:
    """Tokens with padding."""
    if "prompts" in batch:
        return len(batch["prompts"]) * (max(map(len, batch["prompts"])) + batch["max_new_tokens"])
    return batch["input_ids"].numel()


def _split(batch: Batch) -> list[Batch]:
    rows = len(batch["index"])
    by_row = {key for key, value in batch.items() if isinstance(value, torch.Tensor | list) and len(value) == rows}
    return [
        {key: value[part] if key in by_row else value for key, value in batch.items()}
        for part in (slice(0, (rows + 1) // 2), slice((rows + 1) // 2, rows))
    ]


def _join(found: list[tuple[Batch, Any]]) -> Any:
    if not isinstance(found[0][1], Mapping):
        return [row for _, part in found for row in part]
    names = dict.fromkeys(name for _, part in found for name in part)
    # A score that no row of one half reads is missing there.
    return {
        name: torch.cat([part.get(name, torch.full_like(next(iter(part.values())), torch.nan)) for _, part in found])
        for name in names
    }
