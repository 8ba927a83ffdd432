"""The training state: saved whole or not at all, also when a signal stops the run, and read without running code.

Not Lightning's `ModelCheckpoint` and signal handlers: those save in the middle of an effective batch, whose gradients a
checkpoint does not hold, so that a resumed run would end with other weights.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from zipfile import BadZipFile, ZipFile

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import replace, writing

LAST = "last.ckpt"


@dataclass
class CheckpointOptions:
    """When the training state is saved, apart from a stop by a signal.

    Args:
        every_steps: Optimizer steps between two saves within an epoch; null saves only at its end.
        every_epochs: Epochs between two saves at their ends; null saves at none, nor where a run ends inside an epoch.
    """

    every_steps: int | None = None
    every_epochs: int | None = 1

    def __post_init__(self) -> None:
        for name, without in (("every_steps", "null saves by epoch"), ("every_epochs", "null saves none")):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--checkpoint.{name} must be at least 1, got {value}; {without}")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Keeps the earlier file until the new one is complete on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with writing(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        try:
            # PyTorch writes checksums but does not check them.
            with ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise BadZipFile
            return super().load_checkpoint(path, map_location, weights_only=True)
        except Exception as error:
            raise UserError(
                f"--ckpt_path {path} is damaged or no checkpoint of simnpo_pl; give another, or start without one"
            ) from error


class Stopped(BaseException):
    """The run ends because of the signal `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Context manager that handles SIGTERM, SIGINT and SLURM's warning before the end of a job's time.

    In the Trainer's loops, between `defer()` and `defer(False)`, the first signal is stored in `requested`. Any other
    signal raises `Stopped`. A `SLURMEnvironment` among the Trainer's plugins may name another signal than SIGUSR1.
    """

    def __init__(self, plugins: Iterable[Any] = ()) -> None:
        slurm = next((plugin for plugin in plugins if isinstance(plugin, SLURMEnvironment)), None)
        requeues = SLURMEnvironment.detect() if slurm is None else slurm.auto_requeue
        self.requeue = (signal.SIGUSR1 if slurm is None else slurm.requeue_signal) if requeues else None
        self.requested, self._since = 0, 0.0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def defer(self, deferred: bool = True) -> None:
        self._deferred = deferred
        # Every entry point of the Trainer replaces these with its own handlers.
        for signum in self._before:
            signal.signal(signum, self._handle)

    def __enter__(self) -> "StopSignals":
        signals = [signal.SIGTERM, signal.SIGINT, *([] if self.requeue is None else [self.requeue])]
        # A shell that runs the command in the background has it ignore interrupts.
        self._before = {s: handler for s in signals if (handler := signal.getsignal(s)) != signal.SIG_IGN}
        self.defer(False)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A study passes on the one that its whole process group got.
        if signum == self.requested == signal.SIGTERM and time.monotonic() < self._since + 1:
            return
        if not self._deferred or self.requested:
            raise Stopped(signum)
        self.requested, self._since = signum, time.monotonic()
        name = signal.Signals(signum).name
        print(f"\n{name}: stops once the state is saved; send it again to stop at once", file=sys.stderr, flush=True)


class SaveState(Checkpoint):
    """Saves `last.ckpt` at the ends of epochs, every few steps, and before the run ends inside an epoch.

    Saves and stops only between optimizer steps, where no gradient is accumulated. All processes agree on a stop.
    """

    def __init__(self, folder: Path, options: CheckpointOptions, signals: StopSignals) -> None:
        self.file = folder / LAST
        self.every, self.every_epochs = options.every_steps, options.every_epochs
        self.signals = signals
        self._saved_step, self._ends, self._between = -1, False, True

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # Where max_steps is given Lightning would end a finished epoch once more: later ones would get other numbers.
        trainer.fit_loop._iteration_based_training = lambda: False

    def save(self, trainer: pl.Trainer) -> None:
        # Sharded strategies write a folder, which takes the name only once it is complete.
        fresh = self.file.with_name(f".{LAST}.new")
        # False: not only the weights.
        trainer.save_checkpoint(fresh, False)
        if trainer.is_global_zero:
            replace(fresh, self.file)
        trainer.strategy.barrier()
        self._saved_step = trainer.global_step

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        batch = loops["epoch_loop.batch_progress"]["current"]
        if trainer.validating or batch["completed"] < batch["processed"]:
            # An evaluation goes on or may follow. Lightning repeats it only if saved inside of one of its batches;
            # callbacks run between batches. Without this a resumed run would skip that evaluation.
            progress = loops["epoch_loop.val_loop.batch_progress"]
            for scope in ("total", "current"):
                progress[scope] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.signals.defer()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._between = trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # A stop that max_time or EarlyStopping asks for inside an effective batch waits for its end.
        self._ends |= trainer.should_stop
        trainer.should_stop = self._ends and self._between
        over = self._is_over(trainer)
        # A run that is over would not resume an evaluation: it is saved after the one that follows.
        evaluates = trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        # After the last batch the epoch's evaluation starts or the epoch ends; both save.
        if self._between and not trainer.is_last_batch and not (over and evaluates):
            self._save_if_due(trainer, over and self.every_epochs is not None)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.signals.defer()
        if trainer.state.fn == "fit" and trainer.is_last_batch and not self._is_over(trainer):
            self._save_if_due(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        in_fit = trainer.state.fn == "fit"
        if self._is_over(trainer) or (in_fit and not trainer.is_last_batch):
            return
        stop = self._agreed_signal(trainer)
        if stop and in_fit and self._saved_step != trainer.global_step:
            self.save(trainer)
        self._stop(trainer, stop)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.signals.defer(trainer.state.fn == "fit")
        self._ends |= trainer.should_stop
        trainer.should_stop &= self._between
        if self._is_over(trainer):
            self._save_if_due(trainer, self.every_epochs is not None and not trainer.is_last_batch)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        due = self.every_epochs is not None and (trainer.current_epoch + 1) % self.every_epochs == 0
        # Lightning would go on from an epoch's end, also where the run ends before it.
        if trainer.is_last_batch and (due or self._agreed_signal(trainer)):
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._stop(trainer, self._agreed_signal(trainer))
        self.signals.defer(False)

    def _save_if_due(self, trainer: pl.Trainer, due: bool = False) -> None:
        stop = self._agreed_signal(trainer)
        if stop or due or (self.every is not None and trainer.global_step % self.every == 0):
            self.save(trainer)
        if not self._is_over(trainer):
            self._stop(trainer, stop)

    def _agreed_signal(self, trainer: pl.Trainer) -> int:
        """Signal that any process received; 0 for none."""
        if trainer.world_size == 1:
            # A GPU would have to be waited for.
            return self.signals.requested
        requested = torch.tensor(self.signals.requested, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(requested, reduce_op="max"))

    @staticmethod
    def _is_over(trainer: pl.Trainer) -> bool:
        """Whether no step is left. A resumed run would not go on, so that its last evaluation would be lost."""
        # Lightning has no public name for whether min_epochs and min_steps are reached.
        early = trainer.should_stop and trainer.fit_loop._can_stop_early
        return trainer.state.fn == "fit" and (early or trainer.global_step == trainer.max_steps)

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        if signum:
            if signum == self.signals.requeue and trainer.is_global_zero:
                _requeue()
            raise Stopped(signum)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        queued = subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
    except OSError:
        queued = False
    how = "is queued again" if queued else "could not be queued again: submit it by hand"
    print(f"SLURM job {job} {how}", file=sys.stderr)
