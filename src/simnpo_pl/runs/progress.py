"""The progress bar: one line that says what runs, how far it is, how long it still takes, and the losses."""

import math
from typing import Any

from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from simnpo_pl.runs.folder import RunFolder

EVALUATED = {
    **{"start": "start model", "retrained": "retrained model", "mia_reference": "reference"},
    **{"answers": "answers of the start model", "depth": "depth of unlearning"},
}
"""What is evaluated in a role, as the terminal calls it; in others it is the model."""


class ProgressBar(AnyProgressBar):
    """One bar at a time: the whole training, with the evaluations in it, or one evaluation; 80 columns are enough.

    Args:
        folder: Knows which model is evaluated; by default the policy.
    """

    def __init__(self, folder: RunFolder | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._enabled = True
        self._bar: Progress | None = None

    def disable(self) -> None:
        """By Lightning, in all processes but the first."""
        self._enabled = False

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self._start("training", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        of = f" of {trainer.max_epochs}" if trainer.max_epochs != -1 else ""
        self._update(description=f"epoch {trainer.current_epoch + 1}{of}")

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._update(completed=trainer.global_step, note=self._losses(trainer))

    def on_validation_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.state.fn != "fit":
            role = "final" if self.folder is None else self.folder.role
            batches = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
            self._start(f"evaluating {EVALUATED.get(role, 'model')}", sum(batches))

    on_test_start = on_validation_start

    def on_predict_start(self, trainer: Any, *_: Any) -> None:
        self._start("generating", sum(trainer.num_predict_batches))

    def on_validation_batch_end(self, trainer: Any, *args: Any, **_: Any) -> None:
        if trainer.state.fn == "fit":
            self._update(note=f"evaluating {args[3] + 1}/{sum(trainer.num_val_batches)}")
        else:
            self._update(advance=1)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if trainer.state.fn == "fit":
            self._update(note=self._losses(trainer))
        else:
            self._stop()

    def _start(self, what: str, total: float, done: int = 0) -> None:
        self._stop()
        time = TimeRemainingColumn(elapsed_when_finished=True)
        columns = ("{task.description}", BarColumn(16), MofNCompleteColumn(), time, "{task.fields[note]}")
        # Speed over the whole bar: the evaluations between the epochs count, too.
        self._bar = Progress(*columns, disable=not self._enabled, speed_estimate_period=math.inf)
        self._bar.add_task(what, total=total if math.isfinite(total) else None, completed=done, note="")
        self._bar.start()

    def _update(self, **values: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], **values)

    def _stop(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    on_train_end = on_test_end = on_predict_end = on_exception = _stop

    def _losses(self, trainer: Any) -> str:
        if not self._enabled:
            # A number would have to be waited for.
            return ""
        found = {name: trainer.progress_bar_metrics.get(f"train/{name}_loss") for name in ("forget", "retain")}
        return "  ".join(f"{name} {value:.3f}" for name, value in found.items() if value is not None)
