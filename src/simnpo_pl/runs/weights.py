"""Gradient weights of the forget rows over training: `weights.jsonl` and TensorBoard, from the passes that train."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from simnpo_pl.utils.files import read_json_lines, write_json_lines

WEIGHTS = "weights.jsonl"
SCORES = ("weight", "logp", "length")


class GradientWeights(Callback):
    """Keeps, for every forget row and epoch, the module's `forget_scores` of the pass that trained on the row.

    Scores stay on the device until the epoch ends. Each process fills its rows of one table, so that every row is in it
    once on any number of processes and under accumulation.

    A line of `weights.jsonl` has `index` (of the forget row), `epoch` and `step` (epoch and optimizer step of the pass,
    from 1), `weight` (see `Objective.gradient_weights`), `length` (n, scored tokens), `logp` (their sum, nats) and
    `probability` (exp(logp / n)).
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / WEIGHTS
        self.rows: list[dict[str, Any]] = []
        # Each `(B, 6)`: index, count, step, weight, logp, length.
        self._passes: list[Tensor] = []
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is not None and self.file.is_file():
            self.rows = [row for row in read_json_lines(self.file) if row["epoch"] <= trainer.current_epoch]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # A checkpoint from the end of an epoch holds that epoch's.
        self._passes = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step + 1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        scores, forget = pl_module.forget_scores, batch["forget"]
        if scores and "index" in forget:
            # Rows of weight 0 only fill up the batch.
            counts = forget.get("weight", torch.ones_like(scores["weight"]))
            steps = torch.full_like(scores["weight"], self._step)
            columns = [forget["index"], counts, steps, *(scores[name] for name in SCORES)]
            self._passes.append(torch.stack([column.float() for column in columns], dim=1))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        table = self._table(trainer, pl_module)
        checkpoint["gradient_weights"] = None if table is None else table.cpu()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        table = checkpoint.get("gradient_weights")
        if table is not None and trainer.is_global_zero:
            index = table[:, 0].nonzero()
            self._passes = [torch.cat([index.float(), table[index[:, 0]]], dim=1).to(pl_module.device)]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        table = self._table(trainer, pl_module)
        self._passes = []
        if table is not None and trainer.is_global_zero:
            rows = _rows_of(table.cpu().double(), trainer.current_epoch + 1)
            self.rows += rows
            write_json_lines(self.file, self.rows)
            self._log(trainer, rows)

    def _table(self, trainer: pl.Trainer, pl_module: Any) -> Tensor | None:
        """`(N, 5)` count, step, weight, logp and length by index of the rows that any process saw; None for none."""
        largest = torch.cat(self._passes)[:, 0].max() if self._passes else torch.tensor(-1.0, device=pl_module.device)
        size = int(trainer.strategy.reduce(largest, reduce_op="max")) + 1
        if not size:
            return None
        table = torch.zeros(size, 2 + len(SCORES), device=pl_module.device)
        for scores in self._passes:
            real = scores[scores[:, 1] > 0]
            table[real[:, 0].long()] = real[:, 1:]
        return trainer.strategy.reduce(table, reduce_op="sum")

    def _log(self, trainer: pl.Trainer, rows: list[dict[str, Any]]) -> None:
        """Mean weight by optimizer step, and the epoch's weights as a histogram."""
        if trainer.logger is None:
            return
        by_step = defaultdict(list)
        for row in rows:
            by_step[row["step"]].append(row["weight"])
        for step, weights in sorted(by_step.items()):
            # Lightning logs the losses of the first step at 0.
            trainer.logger.log_metrics({"train/gradient_weight": sum(weights) / len(weights)}, step - 1)
        writer: Any = getattr(trainer.logger, "experiment", None)
        if hasattr(writer, "add_histogram"):
            all_weights = torch.tensor([row["weight"] for row in rows])
            writer.add_histogram("train/gradient_weights", all_weights, trainer.global_step)


def _rows_of(table: Tensor, epoch: int) -> list[dict[str, Any]]:
    probability = (table[:, 3] / table[:, 4].clamp(min=1)).exp()
    rows = []
    for index in table[:, 0].nonzero().flatten().tolist():
        _, step, weight, logp, length = table[index].tolist()
        row = {"index": index, "epoch": epoch, "step": int(step), "weight": weight, "length": int(length), "logp": logp}
        rows.append({**row, "probability": probability[index].item()})
    return rows
