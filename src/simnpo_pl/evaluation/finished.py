"""Finished batches of evaluations: a killed process resumes there, and runs of a study evaluate a model once."""

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

SYNC_SECONDS = 1.0
"""A loss of power costs at most the results of this time; a kill costs none."""
PACKAGE = Path(__file__).parents[1]
T = TypeVar("T")


class FinishedBatches:
    """Outcomes of an evaluation's batches, by number, in a file of each process.

    A line is a checksum and an outcome, so a line that was cut short is not used. Batches do not depend on the number
    of processes, so another number of them may resume.

    Args:
        folder: Holds a folder for every evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[int, Any] = {}
        self._everywhere: list[set[int]] = []
        self._path = folder
        self._file: Any = None
        self._synced = 0.0

    def open(self, identity: str, rank: int = 0) -> None:
        """Start or resume the evaluation with this identity, on this process."""
        self.close()
        folder = self.folder / identity
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = dict(line for file in sorted(folder.glob("*.jsonl")) for line in _read(file))
        # A fresh file, because a line that was cut short would spoil the one after it.
        self._path = folder / f"{time.time_ns()}-{rank}.jsonl"
        self._everywhere = gather(set(self._kept))

    def found(self, batch: Mapping[str, Any]) -> Any:
        """The batch's earlier outcome; None if it has to be run.

        In each turn all processes run their batch or none does: sharded models wait for each other.
        """
        everywhere = all(number in kept for number, kept in zip(batch["turn"], self._everywhere, strict=True))
        return self._kept[batch["number"]] if everywhere else None

    def keep(self, batch: Mapping[str, Any], outcome: Any) -> None:
        """Write down a batch's outcome: float32 or int64 tensors by name, or lists of token ids."""
        if isinstance(outcome, Mapping):
            outcome = {name: value.tolist() for name, value in outcome.items()}
        content = json.dumps([batch["number"], outcome]).encode()
        try:
            self._file = self._file or self._path.open("ab")
            self._file.write(b"%08x %b\n" % (zlib.crc32(content), content))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def drop(self) -> None:
        """Delete all evaluations."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(file: Path) -> Iterator[tuple[int, Any]]:
    for line in file.read_bytes().split(b"\n"):
        checksum, _, content = line.partition(b" ")
        if content and checksum == b"%08x" % zlib.crc32(content):
            number, outcome = json.loads(content)
            if isinstance(outcome, dict):
                outcome = {name: torch.tensor(values) for name, values in outcome.items()}
            yield number, outcome


def gather(thing: T) -> list[T]:
    """The thing of every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [thing]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, thing)
    return gathered


def identity(model: Any, evaluation: Any, *settings: object) -> str:
    """Digest of all that outcomes depend on: weights of all processes, config, adapter scales, rows, code, settings."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        local: Tensor = getattr(weight, "_local_tensor", weight).detach()
        digest.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
        for sums in _sums(local):
            digest.update(sums.cpu().numpy().tobytes())
    weights = sorted(set(gather(digest.hexdigest())))
    versions = [version(name) for name in ("torch", "transformers")]
    config = {**model.config.to_dict(), "_name_or_path": None}
    scales = [scale for module in model.modules() if isinstance(scale := getattr(module, "scaling", None), dict)]
    content = (weights, config, scales, evaluation.digest(), _code(model, evaluation), versions, settings)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:24]


def _sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the bits of a tensor's numbers over rows and over columns, made where the tensor is.

    A changed number changes two of them. To copy all weights to the CPU and hash them takes 8 s for 4.6 GiB.
    """
    bits = weight.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize])
    bits = bits.flatten(1) if bits.dim() > 1 else bits.reshape(1, -1)
    # In their own type: what overflows is cut off, and no wider copy is made.
    return bits.sum(dim=0, dtype=bits.dtype), bits.sum(dim=1, dtype=bits.dtype)


def _code(*things: object) -> str:
    """Of this package's source and of the files that define the classes of these objects."""
    modules = {kind.__module__ for thing in things for kind in type(thing).__mro__}
    files = (getattr(sys.modules.get(name), "__file__", None) for name in modules)
    digest = hashlib.sha256()
    for file in sorted({*PACKAGE.rglob("*.py"), *(Path(file) for file in files if file)}):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
