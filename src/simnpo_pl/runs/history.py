"""`history.jsonl`: losses and learning rate of every optimizer step, readable without TensorBoard.

Not Lightning's `CSVLogger`: it starts a new file when a run is resumed.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from simnpo_pl.utils.files import read_json_lines, write_json_lines

HISTORY = "history.jsonl"


class History(Callback):
    """Writes a line a step: `step`, `epoch`, `lr` and what the module logs as `train/...`.

    The file is written at the end of every epoch and with every checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / HISTORY
        self._lines: list[dict[str, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Steps after the checkpoint of a resumed run are repeated.
        if trainer.ckpt_path is not None and self.file.is_file():
            self._lines = [line for line in read_json_lines(self.file) if line["step"] <= trainer.global_step]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        # After the step the learning rate is the next step's.
        rate = optimizer.param_groups[0]["lr"]
        self._lines.append({"step": trainer.global_step + 1, "epoch": trainer.current_epoch + 1, "lr": rate})

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._lines and self._lines[-1]["step"] == trainer.global_step:
            values = {
                k.removeprefix("train/"): v for k, v in trainer.callback_metrics.items() if k.startswith("train/")
            }
            self._lines[-1] |= values

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for line in self._lines:
            # Values stay on the device until they are written.
            line.update({name: value.item() for name, value in line.items() if isinstance(value, Tensor)})
        if trainer.is_global_zero:
            write_json_lines(self.file, self._lines)
