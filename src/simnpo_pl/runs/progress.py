"""Lightning's progress bar with rows per second in evaluations, whose batches differ in size."""

from collections import Counter
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import Task
from rich.text import Text


class ProgressBar(RichProgressBar):
    """Speed is in steps per second in training, in rows of this process per second in evaluations.

    Attributes:
        rows: Rows done, scored or generated, by id of the bar.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[Any] = Counter()

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *number: int) -> None:
        self.rows[self.val_progress_bar_id] += len(batch["index"])
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, *number)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *number: int) -> None:
        self.rows[self.test_progress_bar_id] += len(batch["index"])
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *number)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *number: int) -> None:
        self.rows[self.predict_progress_bar_id] += len(batch["index"])
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, *number)

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        # Short names, for terminals of 80 columns.
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/").removesuffix("_loss"): value for name, value in metrics.items()}

    def configure_columns(self, trainer: Any) -> list[Any]:
        self.rows.clear()
        columns = super().configure_columns(trainer)
        return [Speed(self.rows, c.style) if isinstance(c, ProcessingSpeedColumn) else c for c in columns]


class Speed(ProcessingSpeedColumn):
    def __init__(self, rows: Counter[Any], style: Any) -> None:
        super().__init__(style)
        self.rows = rows

    def render(self, task: Task) -> Any:
        if task.id in self.rows and task.elapsed:
            return Text(f"{self.rows[task.id] / task.elapsed:.1f} rows/s", style=self.style)
        return super().render(task)
