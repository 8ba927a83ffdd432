"""Saves the training state so that no kill costs more than a few steps, and stops a run that is asked to stop."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint

from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import replace
from simnpo_pl.runs.stopping import Stopped, StopSignals

LAST = "last.ckpt"


@dataclass
class CheckpointOptions:
    """When the training state is saved, beside the end of every epoch.

    Args:
        every_steps: Optimizer steps between two saves within an epoch; null saves at its end only.
    """

    every_steps: int | None = None

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise UserError(f"--checkpoint.every_steps must be at least 1, got {self.every_steps}; null saves by epoch")


class SaveState(Checkpoint):
    """Keeps `last.ckpt` whole at all times: at the end of every epoch, every few steps, and when a signal comes.

    States are saved between optimizer steps only, where no gradient has been accumulated. All processes agree on
    stopping, after an optimizer step or a batch of an evaluation.

    Args:
        folder: Where to save.
        options: When to save.
        signals: Tell that a stop was asked for.
    """

    def __init__(self, folder: Path, options: CheckpointOptions, signals: StopSignals) -> None:
        self.file = folder / LAST
        self.every = options.every_steps
        self.signals = signals
        self._step = 0
        self._saved = -1

    # -- saving ------------------------------------------------------------------------------------------

    def save(self, trainer: pl.Trainer) -> None:
        """Save the training state; the one before it stays until this one is whole."""
        fresh = self.file.with_name(f".{LAST}.new")
        # Not the weights only, that is.
        trainer.save_checkpoint(fresh, False)
        if trainer.is_global_zero:
            replace(fresh, self.file)
        trainer.strategy.barrier()
        self._saved = trainer.global_step

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Have a run that goes on from the last batch of an epoch evaluate that epoch first.

        Lightning would take such an epoch for finished. It goes back to an evaluation that had begun, so the state
        says that this one has.
        """
        loop = trainer.fit_loop
        within_epoch = loop.epoch_progress.total.processed < loop.epoch_progress.total.started
        if within_epoch and loop.epoch_loop.batch_progress.is_last_batch:
            state = checkpoint["loops"]["fit_loop"]
            batches = state["epoch_loop.batch_progress"]
            for scope in ("total", "current"):
                batches[scope]["completed"] = batches[scope]["processed"]
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            evaluated = state["epoch_loop.val_loop.batch_progress"]
            evaluated["total"], evaluated["current"] = dict(begun), dict(begun)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save every few steps, and before stopping."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        stop = self._agreed(trainer)
        if stop or (self.every is not None and self._step % self.every == 0):
            self.save(trainer)
        self._stop(trainer, stop)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save after the epoch's evaluation."""
        self.save(trainer)

    # -- stopping ----------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Take SLURM's signal before the end of a job's time for one to stop and start again."""
        requeueing = _requeue_signal(trainer)
        if requeueing is not None:
            self.signals.also(requeueing)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note signals from now on."""
        self._step = trainer.global_step
        self.signals.wait()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Stop before the export if that was asked for."""
        self._stop(trainer, self._agreed(trainer))
        self.signals.wait(False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note signals from now on."""
        self.signals.wait()

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop between two batches; of an epoch's evaluation not without its training state."""
        stop = self._agreed(trainer)
        if stop and trainer.state.fn == "fit" and self._saved != trainer.global_step:
            self.save(trainer)
        self._stop(trainer, stop)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Within an epoch signals go on being noted."""
        self.signals.wait(trainer.state.fn == "fit")

    on_test_end = on_predict_end = on_validation_end

    def _agreed(self, trainer: pl.Trainer) -> int:
        """Number of the signal that any process has; 0 for none."""
        asked = self.signals.requested
        if trainer.world_size > 1:
            number = torch.tensor(asked, device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(number, reduce_op="max"))
        return asked

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        if signum:
            if signum == _requeue_signal(trainer) and trainer.is_global_zero:
                _requeue()
            raise Stopped(signum)


def _requeue_signal(trainer: Any) -> int | None:
    """The signal on which this SLURM job is to be started again; None outside SLURM."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal or signal.SIGUSR1


def _requeue() -> None:
    """Have SLURM start this job again.

    Lightning would save and requeue in the middle of whatever the signal interrupts; here the state is saved already.
    """
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise UserError(f"SLURM_JOB_ID: expected a number, got {job!r}; submit the job again by hand")
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
    except OSError:
        done = False
    how = "is queued again" if done else "could not be queued again: submit it by hand"
    print(f"SLURM job {job} {how}", file=sys.stderr)
