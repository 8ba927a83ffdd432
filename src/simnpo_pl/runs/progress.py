"""Lightning's progress bar with short names of the losses."""

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Shows `forget` and `retain` for the losses `train/forget_loss` and `train/retain_loss`, in 80 columns."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/").removesuffix("_loss"): value for name, value in metrics.items()}
