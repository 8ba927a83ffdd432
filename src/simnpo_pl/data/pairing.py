"""The order of training: which forget and retain rows each process uses in each micro-batch.

An epoch is one pass over the forget set; Lightning's own pairing of two data loaders would make it a pass over the
larger retain set. All choices follow from (seed, epoch, forget row), so they do not change with the number of processes
or the batch size, and a resumed run repeats them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from simnpo_pl.utils.errors import UserError

# First words of the seeds, so that the kinds of draws are independent of each other.
_FORGET_ORDER, _RETAIN_PARTNER, _ALTERNATE, _STEP = 1, 2, 3, 4

_CUT = ("forget_rows", "retain_rows", "effective_batch", "per_device_batch", "world_size", "seed")


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one process in one forward and backward pass.

    Attributes:
        forget: Indices of forget rows, at least one.
        retain: Index of the retain partner of each of them; empty without a retain set.
        real: Whether each forget row counts; a filler, which makes the number of forward passes equal on all
            processes, does not.
        step_forget: All rows that count in this optimizer step, over all processes and micro-batches.
        step_retain: The retain partner of each of these.
    """

    forget: tuple[int, ...]
    retain: tuple[int, ...]
    real: tuple[bool, ...]
    step_forget: tuple[int, ...]
    step_retain: tuple[int, ...]


@dataclass(eq=False)
class PairedSampler(Sampler[MicroBatch]):
    """Yields the micro-batches of one process for one epoch.

    The forget rows, in an order shuffled by (seed, epoch), are cut into effective batches, one per optimizer
    step; only the last may be smaller. Forget row f is paired with entry f, modulo the number of retain rows,
    of a shuffle of the retain set by (seed, epoch). So partners change every epoch, come from the whole
    retain set, and none repeats within an epoch before all have been used. Without retain rows nothing is paired.

    Raises:
        UserError: A number is out of range, or `effective_batch` is not a multiple of
            `world_size * per_device_batch`.
    """

    forget_rows: int
    retain_rows: int
    effective_batch: int
    per_device_batch: int
    world_size: int = 1
    rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("forget_rows", "effective_batch", "per_device_batch", "world_size")
        for name, least in {**dict.fromkeys(positive, 1), "retain_rows": 0, "rank": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.rank >= self.world_size:
            raise UserError(f"rank must be below world_size {self.world_size}, got {self.rank}")
        _check_divisible(self.effective_batch, self.per_device_batch, self.world_size)
        self.epoch = self.yielded = 0
        self._resumed = (-1, 0)

    @property
    def accumulate(self) -> int:
        """Micro-batches of each process in a full optimizer step."""
        return self.effective_batch // (self.world_size * self.per_device_batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, of the next iteration; Lightning calls this."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Progress in the epoch, and the settings that its micro-batches follow from."""
        return {
            "epoch": self.epoch,
            "yielded": self.yielded,
            "all": self.yielded == len(self),
            "cut": {name: getattr(self, name) for name in _CUT},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Skip the micro-batches that were yielded before in the next iteration over the state's epoch."""
        if not state["all"]:
            for name, value in state["cut"].items():
                if getattr(self, name) != value:
                    raise UserError(
                        f"--ckpt_path: the checkpoint was made in the middle of an epoch with {name} {value}, here it "
                        f"is {getattr(self, name)}: resume with the settings of its run, or from the end of an epoch"
                    )
        self._resumed = (state["epoch"], len(self) if state["all"] else state["yielded"])

    def __len__(self) -> int:
        """Micro-batches of this process in one epoch; the same on every process."""
        full, rest = divmod(self.forget_rows, self.effective_batch)
        return full * self.accumulate + self._micro_batches(rest)

    def __iter__(self) -> Iterator[MicroBatch]:
        epoch, yielded = self._resumed
        self.yielded = yielded if epoch == self.epoch else 0
        for micro in islice(self._all(), self.yielded, None):
            self.yielded += 1
            yield micro

    def _all(self) -> Iterator[MicroBatch]:
        order = _shuffled(self.forget_rows, _FORGET_ORDER, self.seed, self.epoch)
        partners = _shuffled(self.retain_rows, _RETAIN_PARTNER, self.seed, self.epoch)
        for start in range(0, self.forget_rows, self.effective_batch):
            step = order[start : start + self.effective_batch]
            step_retain = _partners(step, partners)
            # Shares differ by at most one row; the larger ones come first and so fall on all processes.
            shares = np.array_split(step, self._micro_batches(len(step)) * self.world_size)
            for share in shares[self.rank :: self.world_size]:
                forget = tuple(share.tolist()) or step[:1]
                real = (len(share) > 0,) * len(forget)
                yield MicroBatch(forget, _partners(forget, partners), real, step, step_retain)

    def _micro_batches(self, rows: int) -> int:
        """Micro-batches of each process in an optimizer step with this number of rows."""
        return math.ceil(rows / (self.world_size * self.per_device_batch))


def _check_divisible(effective_batch: int, per_device_batch: int, world_size: int) -> None:
    unit = world_size * per_device_batch
    below = effective_batch // unit * unit
    if effective_batch == below:
        return
    nearby = " or ".join(str(value) for value in (below, below + unit) if value)
    advice = f"set effective_batch to {nearby}"
    share, rest = divmod(effective_batch, world_size)
    if rest == 0:
        fitting = max(size for size in range(1, per_device_batch + 1) if share % size == 0)
        advice += f", or per_device_batch to {fitting}"
    raise UserError(
        f"effective_batch {effective_batch} is not a multiple of {world_size} processes x "
        f"per_device_batch {per_device_batch} = {unit}: {advice}"
    )


def draw_alternate(refusals: int, seed: int, row: int) -> int:
    """Index of the refusal that a forget row is answered with; the same for the whole run."""
    return int(np.random.default_rng([_ALTERNATE, seed, row]).integers(refusals))


def draw_step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """Seed of a forward pass (dropout), so that a resumed run draws the same and no two processes do."""
    return int(np.random.SeedSequence([_STEP, seed, epoch, batch, rank]).generate_state(1)[0])


def _shuffled(rows: int, kind: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The numbers below `rows` in an order that follows from the other arguments."""
    return tuple(np.random.default_rng([kind, seed, epoch]).permutation(rows).tolist())


def _partners(forget: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """The retain partner of each forget row."""
    return tuple(order[row % len(order)] for row in forget) if order else ()
