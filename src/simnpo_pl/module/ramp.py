"""The learning rate that `--model.lr auto` stands for: a ramp of a few optimizer steps, which are then undone."""

import math
import time
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from simnpo_pl.data.training import effective_mean
from simnpo_pl.models.sharding import is_sharded
from simnpo_pl.module.optimization import adamw
from simnpo_pl.utils.errors import UserError

FIRST_RATE, GROWTH, RATES = 1e-6, 2.0, 18
"""The ramp: its first rate, the factor between two rates, and their number at most."""
FALL = 0.5
"""The ramp ends where the forget probability has fallen to this share of the start model's."""
READ = ("forget", "retain")
"""Parts of a batch whose probability is read."""
LENGTH = 2.0
"""Sum of the run's rates, as a multiple of the ramp's: a halved probability is not enough."""


def check_ramp(trainer: Any) -> None:
    """Refuse strategies and precisions where the ramp cannot take the run's steps."""
    if isinstance(trainer.strategy, FSDPStrategy) or trainer.precision == "16-mixed":
        raise UserError(
            "--model.lr auto works with ddp and fsdp2, in 32-true and bf16-mixed: give --model.lr a number; got "
            f"{type(trainer.strategy).__name__}, {trainer.precision}"
        )


def use_found_rate(module: Any) -> dict[str, Any]:
    """Sets the found rate in optimizer and schedule, built for rate 1."""
    scheduler = module.trainer.lr_scheduler_configs[0].scheduler
    steps = range(int(module.trainer.estimated_stepping_batches))
    found = find_rate(module, module.trainer.train_dataloader, sum(map(scheduler.lr_lambdas[0], steps)))
    scheduler.base_lrs = [found["lr"] for _ in scheduler.base_lrs]
    for group in scheduler.optimizer.param_groups:
        group["lr"], group["initial_lr"] = group["lr"] * found["lr"], found["lr"]
    read = ", ".join(f"{p} probability {found[p][0]:.3g} -> {found[p][1]:.3g}" for p in READ if p in found)
    rank_zero_only(print)(
        f"--model.lr auto: {found['steps']} steps at growing rates, then undone ({found['seconds']} s): "
        f"{read}; the run takes lr {found['lr']:g}",
        flush=True,
    )
    if "retain" in found and found["retain"][1] <= FALL * found["retain"][0]:
        rank_zero_only(print)(
            "warning: at this rate the ramp halved the kept answers, too; the run's retain loss has to bring them "
            "back. If they stay low, give more or other rows to keep, or a lower --model.lr",
            flush=True,
        )
    return found


def find_rate(module: Any, loader: Any, factors: float) -> dict[str, Any]:
    """Finds the peak of the learning rate by a few optimizer steps at growing rates, which are then undone.

    Each step takes the next effective batch of the first epoch and a rate twice the last one, until the probability of
    the first batch's forget answers has halved: a learning-rate range test (Smith 2017, arXiv 1506.01186) that reads
    what unlearning is to change. AdamW moves a weight by about its rate in a step, so the sum of the ramp's rates says
    how far the weights have to move; the run's rates add up to `LENGTH` times that. That retain answers lose, too, does
    not end the ramp: its few steps give the retain loss no time to bring them back, the run's many do.

    `module` is an `UnlearningModule` in training, with all its frozen models at hand, `loader` has the micro-batches of
    this process, `factors` is the sum of the schedule's factors over all steps of the run.

    Returns:
        `lr`; `steps` and `seconds` that it took; before and after, the probability of `forget` and, with a retain loss,
        of `retain` answers.

    Raises:
        UserError: No rate halves the forget probability, or the one that does raises the objective's loss.
    """
    check_ramp(module.trainer)
    ramp, started = _Ramp(module, loader), time.monotonic()
    before = last = ramp.read()
    loss, total = ramp.forget_loss(), 0.0
    for steps in range(1, RATES + 1):
        rate = FIRST_RATE * GROWTH ** (steps - 1)
        ramp.step(rate)
        total, now = total + rate, ramp.read()
        end = _crossing(before["forget"], last["forget"], now["forget"])
        if end is not None:
            # Where between the last two readings.
            total -= rate * (1 - end)
            break
        last = now
    fell = ramp.forget_loss() < loss
    ramp.restore()
    if end is None or not fell:
        did = "did not halve the forget probability" if end is None else "did not fall as the forget probability halved"
        raise UserError(
            f"--model.lr auto: at rates up to {rate:.2g} this objective {did}: from {before['forget']:.3g} to "
            f"{now['forget']:.3g}; give --model.lr a number"
        )
    read = {part: [round(before[part], 4), round(now[part], 4)] for part in now}
    lr, seconds = float(f"{LENGTH * total / factors:.2g}"), round(time.monotonic() - started, 1)
    return {"lr": lr, "steps": steps, "seconds": seconds, **read}


def _crossing(start: float, last: float, now: float) -> float | None:
    """Fraction of the last step at which probability reached `FALL` x start, by its logarithm; None if above."""
    goal = FALL * start
    if now > goal:
        return None
    if not now > 0:
        return 0.0 if last <= goal else 1.0
    return (math.log(last) - math.log(goal)) / (math.log(last) - math.log(now)) if last > goal else 0.0


class _Ramp:
    """Optimizer steps of an `UnlearningModule`, outside of its loop, that can be undone."""

    def __init__(self, module: Any, loader: Any) -> None:
        self.module, self.strategy = module, module.trainer.strategy
        count = module.trainer.accumulate_grad_batches
        batches = list(islice(loader, RATES * count))
        self.steps = [batches[start : start + count] for start in range(0, len(batches), count)]
        self.number = 0
        self.sharded = is_sharded(module.policy)
        self._reshard()
        self.optimizer = adamw(module.policy, 0.0, module.betas, 0.0, module.eight_bit)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.kept = [_local(weight).to("cpu", copy=True) for weight in self.weights]

    def step(self, rate: float) -> None:
        """One optimizer step at a rate, on the next effective batch."""
        module, world = self.module, self.module.trainer.world_size
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for batch in self.steps[self.number % len(self.steps)]:
            with module.trainer.precision_plugin.forward_context():
                loss = module.losses(self._on_device(batch))["loss"]
            # Losses add up over micro-batches and processes, of which the mean is taken.
            (loss * world).backward()
        if world > 1 and not self.sharded:
            for weight in self.weights:
                weight.grad = self.strategy.reduce(weight.grad, reduce_op="mean")
        self.optimizer.step()
        self.number += 1

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """Mean probability of the answers in the first effective batch, by part, over all processes."""
        module = self.module
        sums: dict[str, Tensor] = {}
        module.policy.eval()
        for batch in self.steps[0]:
            batch = self._on_device(batch)
            for part in [name for name in READ if name in batch]:
                with module.trainer.precision_plugin.forward_context():
                    logps = module._scorer()({part: batch[part]})[part].logps()
                probability = (logps.total.float() / logps.length).exp().nan_to_num(0.0)
                mean = effective_mean(probability, batch[part])
                sums[part] = sums[part] + mean if part in sums else mean
        module.policy.train()
        return {part: float(self.strategy.reduce(value, reduce_op="sum")) for part, value in sums.items()}

    @torch.no_grad()
    def forget_loss(self) -> float:
        """The objective's loss of the first effective batch, over all processes."""
        total = torch.zeros((), device=self.module.device)
        for batch in self.steps[0]:
            with self.module.trainer.precision_plugin.forward_context():
                total += self.module.losses(self._on_device(batch))["forget_loss"]
        return float(self.strategy.reduce(total, reduce_op="sum"))

    @torch.no_grad()
    def restore(self) -> None:
        """The weights as they were, to the bit."""
        self._reshard()
        for weight, kept in zip(self.weights, self.kept, strict=True):
            _local(weight).copy_(kept)

    def _on_device(self, batch: Any) -> dict[str, Any]:
        batch = self.strategy.batch_to_device(batch, self.module.device)
        self.module._reference.add_to(batch)
        return batch

    def _reshard(self) -> None:
        for layer in self.module.policy.modules() if self.sharded else ():
            if hasattr(layer, "reshard"):
                layer.reshard()


def _local(weight: Tensor) -> Tensor:
    """A process's own part of a weight."""
    return getattr(weight, "_local_tensor", weight).detach()
