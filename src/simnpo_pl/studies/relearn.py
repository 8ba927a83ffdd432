"""Relearning attack (SimNPO paper, section 6): fine-tune the unlearned model on part of what it forgot.

Plain cross-entropy on a share of the forget rows, from the run's model/, all weights trained, at a learning rate that
falls linearly to 0; forget quality and probability before and after every epoch. What a run's results.json already
holds is skipped.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from simnpo_pl.report.robustness import relearning_table
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import add_results, finished_runs, reopen


@dataclass(frozen=True)
class Attack:
    """Settings of an attack, as results keep them; see the command's options."""

    subset: str
    share: float
    epochs: int
    lr: float

    @property
    def key(self) -> str:
        return f"{self.subset} share={self.share:g} epochs={self.epochs} lr={self.lr:g}"


class _Curve(Callback):
    """Metrics of every evaluation, by epoch; 0 is the unlearned model."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1 if trainer.state.fn == "fit" else 0
        self.epochs.append({"epoch": epoch, "metrics": pl_module.evaluation_result.values})


def run(options: Namespace) -> None:
    runs = finished_runs(options.runs)
    for one in runs:
        for subset in options.subset:
            seeds = range(options.seed, options.seed + options.repeats) if subset == "random" else [0]
            relearn(one, Attack(subset, options.share, options.epochs, options.lr), seeds)
    rank_zero_only(print)(relearning_table(runs))


def relearn(run: Run, attack: Attack, seeds: Sequence[int]) -> None:
    """Attack the model of a run once for every seed; each finished curve is added to the run's results."""
    known = run.record.get("relearn", {}).get(attack.key, {}).get("repeats", [])
    before: list[dict[str, Any]] = []
    for seed in sorted(set(seeds) - {repeat["seed"] for repeat in known}):
        opened = reopen(
            run,
            *("--model.objective", "FineTune", "--model.forget_weight", "1", "--model.retain_loss", "null"),
            *("--model.lr", str(attack.lr), "--model.warmup_epochs", "0", "--model.schedule", "linear"),
            *("--model.reference", "null", "--model.lora", "null", "--model.trainable", "null"),
            *("--trainer.max_epochs", str(attack.epochs)),
            *("--eval.splits", "[forget]", "--eval.generate_rows", "0"),
        )
        module, data, curve = opened.model, opened.datamodule, _Curve()
        trainer: Any = opened.trainer
        trainer.callbacks.append(curve)
        rows = data.forget_rows = choose_rows(data.forget_lengths(), attack, seed)
        rank_zero_only(print)(f"{run.name}: relearning {len(rows)} {attack.subset} rows, draw {seed}")
        if not before:
            trainer.validate(module, datamodule=data, verbose=False)
            before, curve.epochs = curve.epochs, []
        trainer.fit(module, datamodule=data)
        repeat = {"seed": seed, "rows": rows, "epochs": [*before, *curve.epochs]}
        add_results(run, partial(_add, attack, repeat))


def _add(attack: Attack, repeat: dict[str, Any], results: dict[str, Any]) -> None:
    entry = results.setdefault("relearn", {}).setdefault(attack.key, {"settings": asdict(attack), "repeats": []})
    others = [known for known in entry["repeats"] if known["seed"] != repeat["seed"]]
    entry["repeats"] = sorted([*others, repeat], key=lambda one: one["seed"])


def choose_rows(lengths: Sequence[int], attack: Attack, seed: int) -> list[int]:
    """Rows to relearn, at least one, in ascending order; `lengths` are the scored tokens of every forget row."""
    count = max(1, round(attack.share * len(lengths)))
    if attack.subset == "shortest":
        return sorted(sorted(range(len(lengths)), key=lambda row: (lengths[row], row))[:count])
    return sorted(np.random.default_rng(seed).choice(len(lengths), count, replace=False).tolist())
