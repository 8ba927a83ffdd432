"""Finished batches of an evaluation that is not: a process that is killed has the next one go on where it stood."""

import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SYNC_SECONDS = 1.0
"""Longest time of which a loss of power may cost what was found; a kill costs nothing that was found."""


class FinishedParts:
    """What batches of an evaluation gave, by their number, in a file of each process.

    A line is a checksum and the outcome of a batch, so that a line cut short is not taken for whole. Batches are the
    same on any number of processes, so another number of them may go on.

    Args:
        folder: Holds a folder for every evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[int, Any] = {}
        self._everywhere: list[set[int]] = []
        self._file: Any = None
        self._synced = 0.0

    def open(self, identity: str, rank: int = 0) -> None:
        """Start or go on with an evaluation.

        Args:
            identity: Of everything its outcome depends on.
            rank: This process.
        """
        self.close()
        folder = self.folder / identity
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = {number: found for file in sorted(folder.glob("*.jsonl")) for number, found in _read(file)}
        # A line that a kill cut short would spoil the one after it: every process goes on in a file of its own.
        self._file = (folder / f"{time.time_ns()}-{rank}.jsonl").open("ab")
        self._everywhere = _gather(set(self._kept))

    def found(self, batch: Mapping[str, Any]) -> Any:
        """What the batch gave before; None where it has to be run.

        All processes or none run a batch of theirs at the same time: sharded models wait for each other.
        """
        together = batch["together"]
        if all(n in self._everywhere[rank % len(self._everywhere)] for rank, n in enumerate(together)):
            return self._kept[batch["number"]]
        return None

    def keep(self, batch: Mapping[str, Any], outcome: Any) -> None:
        """Write down what a batch gave: tensors by name, or lists of token ids."""
        content = json.dumps([batch["number"], _plain(outcome)]).encode()
        try:
            self._file.write(b"%08x %b\n" % (zlib.crc32(content), content))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        """End writing."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def drop(self) -> None:
        """Forget all evaluations."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(file: Path) -> Iterator[tuple[int, Any]]:
    for line in file.read_bytes().split(b"\n"):
        checksum, _, content = line.partition(b" ")
        if content and checksum == b"%08x" % zlib.crc32(content):
            number, outcome = json.loads(content)
            yield number, _restored(outcome)


def _plain(outcome: Any) -> Any:
    if isinstance(outcome, Mapping):
        return {name: [str(value.dtype).removeprefix("torch."), value.tolist()] for name, value in outcome.items()}
    return outcome


def _restored(outcome: Any) -> Any:
    if isinstance(outcome, Mapping):
        return {name: torch.tensor(values, dtype=getattr(torch, kind)) for name, (kind, values) in outcome.items()}
    return outcome


def _gather(numbers: set[Any]) -> list[set[Any]]:
    """The set of every process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [numbers]
    gathered: list[set[Any]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, numbers)
    return gathered


def identity(model: torch.nn.Module, *settings: object) -> str:
    """Of a model's weights, over all processes where they are sharded, and of settings."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        local: Tensor = getattr(weight, "_local_tensor", weight).detach().contiguous().cpu()
        digest.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
        digest.update(local.flatten().view(torch.uint8).numpy().data)
    weights = sorted({part for found in _gather({digest.hexdigest()}) for part in found})
    return hashlib.sha256(repr((weights, settings)).encode()).hexdigest()[:24]
