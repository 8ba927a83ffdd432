"""Losses and learning rate of every optimizer step, as a file that needs no TensorBoard to be read."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from simnpo_pl.utils.files import read_json_lines, write_json_lines

HISTORY = "history.jsonl"


class History(Callback):
    """Writes `history.jsonl`: `step`, `epoch`, `lr` and what the module logs as `train/...`, a line a step.

    Args:
        folder: Where to write, at the end of every epoch and with every checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / HISTORY
        self._lines: list[dict[str, Any]] = []
        self._step = 0
        self._rate = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the steps before the checkpoint of a resumed run; those after it are gone through again."""
        self._step = trainer.global_step
        if trainer.ckpt_path is not None and self.file.is_file():
            lines = read_json_lines(self.file)
            self._lines = [line for line in lines if line["step"] <= self._step]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note the step's learning rate; after the step it is the next one's."""
        self._rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note a finished step; values stay on the device until they are written."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        values = {k.removeprefix("train/"): v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self._lines.append({"step": self._step, "epoch": trainer.current_epoch + 1, "lr": self._rate, **values})

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write what a run that goes on from the checkpoint will read."""
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what there is."""
        tensors = [(line, key) for line in self._lines for key, value in line.items() if isinstance(value, Tensor)]
        if tensors:
            found = torch.stack([line[key].detach().float() for line, key in tensors]).tolist()
            for (line, key), value in zip(tensors, found, strict=True):
                line[key] = value
        if trainer.is_global_zero:
            write_json_lines(self.file, self._lines)
