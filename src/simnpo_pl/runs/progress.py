"""Progress bar: Lightning's, with rows per second in an evaluation, whose batches differ in size."""

from collections import Counter
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import ProcessingSpeedColumn
from rich.progress import Task
from rich.text import Text


class ProgressBar(RichProgressBar):
    """Batches, time gone and left, and speed: steps per second in training, rows of this process in an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[Any] = Counter()
        """Rows done, by the bar they are shown in."""

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *number: int) -> None:
        """Count the batch's rows, scored or generated."""
        self.rows[self.val_progress_bar_id] += len(batch["index"])
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, *number)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *number: int) -> None:
        """Count the batch's rows."""
        self.rows[self.test_progress_bar_id] += len(batch["index"])
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *number)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *number: int) -> None:
        """Count the batch's rows."""
        self.rows[self.predict_progress_bar_id] += len(batch["index"])
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, *number)

    def configure_columns(self, trainer: Any) -> list[Any]:
        """Lightning's columns with another speed."""
        self.rows.clear()
        columns = super().configure_columns(trainer)
        return [
            Speed(self.rows, column.style) if isinstance(column, ProcessingSpeedColumn) else column
            for column in columns
        ]


class Speed(ProcessingSpeedColumn):
    """Rows per second where rows are counted, steps per second elsewhere.

    Args:
        rows: Rows done, by bar.
        style: Of the text.
    """

    def __init__(self, rows: Counter[Any], style: Any) -> None:
        super().__init__(style)
        self.rows = rows

    def render(self, task: Task) -> Any:
        """The speed as text."""
        if task.id in self.rows and task.elapsed:
            return Text(f"{self.rows[task.id] / task.elapsed:.1f} rows/s", style=self.style)
        return super().render(task)
