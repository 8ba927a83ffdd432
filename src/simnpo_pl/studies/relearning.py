"""Relearning: part of the forget rows is trained on again, and forgetting measured after every epoch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback

from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import add_results, reopen


@dataclass(frozen=True)
class Attack:
    """Settings of a relearning attack.

    Args:
        subset: Which rows are relearnt: `shortest` (answers, in tokens) or `random`.
        share: Part of the forget rows.
        epochs: Passes over these rows.
        lr: Learning rate at the start; it falls linearly to 0.
    """

    subset: str
    share: float
    epochs: int
    lr: float

    @property
    def key(self) -> str:
        """The settings in one line; where results keep the attack."""
        return f"{self.subset} share={self.share:g} epochs={self.epochs} lr={self.lr:g}"


def choose_rows(lengths: Sequence[int], attack: Attack, seed: int) -> list[int]:
    """Rows to relearn, at least one, in order of their place.

    Args:
        lengths: Scored tokens of every forget row.
        attack: Which rows, and what part of all; rounded to the nearest number of rows.
        seed: Of the random draw.
    """
    count = max(1, round(attack.share * len(lengths)))
    if attack.subset == "shortest":
        return sorted(sorted(range(len(lengths)), key=lambda row: (lengths[row], row))[:count])
    return sorted(np.random.default_rng(seed).choice(len(lengths), count, replace=False).tolist())


class _Curve(Callback):
    """Metrics of every evaluation, by epoch; 0 is the unlearned model."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1 if trainer.state.fn == "fit" else 0
        self.epochs.append({"epoch": epoch, "metrics": pl_module.evaluation_result.values})


def relearn(run: Run, attack: Attack, seeds: Sequence[int]) -> None:
    """Attack the model of a run once for every seed; each curve joins the run's results as soon as it is whole.

    Args:
        run: The run; seeds whose curves its results hold are skipped.
        attack: What to do.
        seeds: Of the random draws.
    """
    entry = run.record.get("relearn", {}).get(attack.key, {"repeats": []})
    done = {repeat["seed"] for repeat in entry["repeats"]}
    before: list[dict[str, Any]] = []
    for seed in [seed for seed in seeds if seed not in done]:
        opened = reopen(
            run,
            *("--model.objective", "FineTune", "--model.forget_weight", "1", "--model.retain_loss", "null"),
            *("--model.lr", str(attack.lr), "--model.warmup_epochs", "0", "--model.schedule", "linear"),
            *("--model.reference", "null", "--model.lora", "null", "--model.trainable", "null"),
            *("--trainer.max_epochs", str(attack.epochs)),
            *("--eval.splits", "[forget]", "--eval.generate_rows", "0"),
        )
        module, data = opened.model, opened.datamodule
        trainer: Any = opened.trainer
        data.parts = module.parts
        data.forget_rows = choose_rows(data.forget_lengths(), attack, seed)
        if trainer.is_global_zero:
            print(f"{run.name}: relearning {len(data.forget_rows)} {attack.subset} rows, draw {seed}", flush=True)
        curve = _Curve()
        trainer.callbacks.append(curve)
        if not before:
            trainer.validate(module, datamodule=data, verbose=False)
            before = list(curve.epochs)
        else:
            curve.epochs = list(before)
        trainer.fit(module, datamodule=data)
        if trainer.is_global_zero:
            _keep(run, attack, {"seed": seed, "rows": data.forget_rows, "epochs": curve.epochs})


def _keep(run: Run, attack: Attack, repeat: dict[str, Any]) -> None:
    def change(content: dict[str, Any]) -> None:
        entry = content.setdefault("relearn", {}).setdefault(attack.key, {"settings": asdict(attack), "repeats": []})
        others = [known for known in entry["repeats"] if known["seed"] != repeat["seed"]]
        entry["repeats"] = sorted([*others, repeat], key=lambda one: one["seed"])

    add_results(run, change)
