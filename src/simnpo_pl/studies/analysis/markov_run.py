"""One run of the Markov-chain study: the module and Trainer of every other run, evaluated between steps."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from simnpo_pl import objectives
from simnpo_pl.benchmarks import MarkovData
from simnpo_pl.benchmarks.markov.process import CHAINS
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.studies.analysis.markov import Curve, Setting


def unlearn(name: str, data: MarkovData, setting: Setting, objective: str, settings: dict[str, float]) -> Curve:
    """Unlearn, evaluating every few steps.

    Args:
        name: Start model.
        data: Fresh data module.
        setting: Of the study.
        objective: Class in `simnpo_pl.objectives`.
        settings: Of the objective.

    Returns:
        Distance of every chain, nats, by `step`, from 0.
    """
    module = UnlearningModule(
        name,
        objective=getattr(objectives, objective)(**settings),
        retain_loss=None,
        forget_weight=1.0,
        lr=setting.lr,
        weight_decay=0.0,
        warmup_epochs=0,
        schedule="constant",
    )
    curve = Distances(setting.every, setting.stop)
    _trainer(max_epochs=-1, max_steps=setting.steps, callbacks=[curve]).fit(module, data)
    return curve.found


def measure_once(name: str, data: MarkovData) -> dict[str, float]:
    """Distances of a model as it is."""
    module = UnlearningModule(name)
    module.configure_model()
    data.trainer = _trainer()
    curve = Distances(1)
    curve.measure(module, data, 0)
    return curve.found[0]


class Distances(Callback):
    """Evaluates between steps; a validation loop of the Trainer would cost more than the steps.

    Args:
        every: Optimizer steps between evaluations.
        stop: Retain distance that ends the run, nats.
    """

    def __init__(self, every: int, stop: float = float("inf")) -> None:
        self.every, self.stop = every, stop
        self.found: Curve = []
        self._batches: list[Any] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure the start model."""
        self.measure(pl_module, trainer.datamodule, 0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Measure after a step."""
        if trainer.global_step % self.every == 0:
            self.measure(pl_module, trainer.datamodule, trainer.global_step)
            trainer.should_stop = self.found[-1]["retain"] > self.stop

    @torch.no_grad()
    def measure(self, module: Any, data: Any, step: int) -> None:
        """Distances now."""
        evaluation = data.evaluation()
        evaluation.reset()
        module.policy.eval()
        self._batches = self._batches or list(data.val_dataloader())
        for batch in self._batches:
            evaluation.add_scores(batch, evaluation.score(module._scorer()({"rows": batch})["rows"], batch))
        module.policy.train()
        values = evaluation.compute().values
        self.found.append({"step": step, **{name: values[f"{name}/distance"] for name in CHAINS}})


def _trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
