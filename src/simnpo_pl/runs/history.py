"""Training, readable without TensorBoard: `history.jsonl`, losses by optimizer step; `weights.jsonl`, by forget row.

Not Lightning's `CSVLogger`: it starts a new file when a run is resumed.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from simnpo_pl.evaluation.finished import gather
from simnpo_pl.utils.files import read_json_lines, write_json_lines

HISTORY = "history.jsonl"
WEIGHTS = "weights.jsonl"


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
            found = trainer.callback_metrics.items()
            self._lines[-1] |= {k.removeprefix("train/"): v for k, v in found if k.startswith("train/")}

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for line in self._lines:
            # Values stay on the device until they are written.
            line.update({name: value.item() for name, value in line.items() if isinstance(value, Tensor)})
        if trainer.is_global_zero:
            write_json_lines(self.file, self._lines)


class GradientWeights(Callback):
    """Keeps, for every forget row and epoch, the module's `forget_scores` of the pass that trained on the row.

    Scores stay on the device until the epoch ends or the state is saved. Every row is there once on any number of
    processes and under accumulation.

    A line of `weights.jsonl` has `index` (of the forget row), `epoch` and `step` (epoch and optimizer step of the pass,
    from 1), `weight` (see `Objective.gradient_weights`), `length` (n, scored tokens), `logp` (their sum, nats) and
    `probability` (exp(logp / n)).
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / WEIGHTS
        self.rows: list[dict[str, Any]] = []
        # Of this epoch: lines from a checkpoint, and of each pass `(B, 6)` index, count, step, weight, logp, length.
        self._resumed: list[dict[str, Any]] = []
        self._passes: list[Tensor] = []
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is not None and self.file.is_file():
            self.rows = [row for row in read_json_lines(self.file) if row["epoch"] <= trainer.current_epoch]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # A checkpoint from the end of an epoch holds that epoch's.
        self._resumed, self._passes = [], []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step + 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        scores, forget = pl_module.forget_scores, batch["forget"]
        if scores and "row" in forget:
            # Rows of weight 0 only fill up the batch.
            counts = forget.get("weight", torch.ones_like(scores["weight"]))
            steps = torch.full_like(scores["weight"], self._step)
            columns = [forget["row"], counts, steps, *(scores[name] for name in ("weight", "logp", "length"))]
            self._passes.append(torch.stack([column.float() for column in columns], dim=1))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradient_weights"] = self._lines(trainer.current_epoch + 1)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self._resumed = checkpoint.get("gradient_weights", [])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        lines = self._lines(trainer.current_epoch + 1)
        self._resumed, self._passes = [], []
        if lines and trainer.is_global_zero:
            self.rows += lines
            write_json_lines(self.file, self.rows)
            _log(trainer, lines)

    def _lines(self, epoch: int) -> list[dict[str, Any]]:
        """Of this epoch, of all processes, by index; a row with several alternates has a line for each."""
        lines = list(self._resumed)
        for index, count, step, weight, logp, length in torch.cat(self._passes).tolist() if self._passes else ():
            if count > 0:
                place = {"index": int(index), "epoch": epoch, "step": int(step)}
                scores = {"weight": weight, "length": int(length), "logp": logp}
                lines.append({**place, **scores, "probability": math.exp(logp / max(1, length))})
        lines = [line for own in gather(lines) for line in own]
        return sorted(lines, key=lambda line: tuple(line[name] for name in ("index", "step", "weight")))


def _log(trainer: pl.Trainer, lines: list[dict[str, Any]]) -> None:
    """Mean weight by optimizer step, and the epoch's weights as a histogram."""
    if trainer.logger is None:
        return
    by_step = defaultdict(list)
    for line in lines:
        by_step[line["step"]].append(line["weight"])
    for step, weights in sorted(by_step.items()):
        # Lightning logs the losses of the first step at 0.
        trainer.logger.log_metrics({"train/gradient_weight": sum(weights) / len(weights)}, step - 1)
    if isinstance(trainer.logger, TensorBoardLogger):
        all_weights = torch.tensor([line["weight"] for line in lines])
        trainer.logger.experiment.add_histogram("train/gradient_weights", all_weights, trainer.global_step)
