"""Writes the policy as a Hugging Face folder: the last epoch's, or the best one's by a named metric."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.metrics.titles import TITLES
from simnpo_pl.models.loading import save_model
from simnpo_pl.models.sharding import gathered
from simnpo_pl.utils.errors import UserError


@dataclass
class ExportOptions:
    """Which epoch's model is exported.

    Args:
        best: Metric that picks the epoch, such as `forget_quality` or `retain/probability`; null takes the last epoch.
        mode: Whether the largest or the smallest value of the metric is the best.
        adapter: Whether a low-rank adapter is written alone, with the name of its base, instead of merged into it.
    """

    best: str | None = None
    mode: Literal["max", "min"] = "max"
    adapter: bool = False


class ExportModel(Callback):
    """Saves policy and tokenizer under `folder`, completely or not at all.

    Attributes:
        epoch: Number of the exported epoch, from 1.
        result: Evaluation of the exported epoch, if a metric picked it in this process.
    """

    def __init__(self, folder: Path, options: ExportOptions) -> None:
        self.folder = folder
        self.options = options
        self.epoch: int | None = None
        self.result: EvalResult | None = None
        self._best: float | None = None

    def check(self, trainer: pl.Trainer, module: Any, evaluation: Evaluation) -> None:
        """Refuse a metric that is not measured, and an adapter that does not exist, before anything runs."""
        if self.options.adapter and module.lora is None:
            raise UserError("--export.adapter true needs an adapter: give --model.lora.rank")
        best = self.options.best
        if best is None:
            return
        if best not in evaluation.names():
            reason = evaluation.unavailable.get(best, f"known are {', '.join(evaluation.names())}")
            raise UserError(f"--export.best {best} is not measured: {reason}")
        higher, mode = evaluation.titles()[best].higher_is_better, self.options.mode
        # A custom metric need not say what is best.
        if higher is not (mode == "max") and (higher is not None or best in TITLES):
            aim = "the retrained model's" if higher is None else "the largest" if higher else "the smallest"
            rank_zero_warn(f"--export.best {best}: {aim} value is best, but --export.mode is {mode}")
        every = trainer.check_val_every_n_epoch
        if every is not None and trainer.max_epochs is not None and 0 <= trainer.max_epochs < every:
            raise UserError(
                f"--export.best {best} picks among evaluated epochs, but --trainer.check_val_every_n_epoch {every} "
                f"evaluates none of {trainer.max_epochs}"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.options.best is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        result: EvalResult = pl_module.evaluation_result
        value = result.values[self.options.best]
        sign = 1 if self.options.mode == "max" else -1
        # NaN is never the best.
        if value == value and (self._best is None or sign * value > sign * self._best):
            self._best, self.result = value, result
            self.save(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.options.best is None:
            self.save(trainer, pl_module, trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self.epoch = state_dict["best"], state_dict["epoch"]

    def save(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        self.epoch = epoch
        # Every process takes part: sharded weights are gathered here.
        state = gathered(trainer.strategy)
        prefix = "policy."
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if trainer.is_global_zero:
            tokenizer, merge = trainer.datamodule.tokenizer, not self.options.adapter
            save_model(pl_module.policy, tokenizer, self.folder, weights, merge=merge)
        # The other processes may read the folder next.
        trainer.strategy.barrier()
