"""CPU time that gradient weights add to a training step, on the demo's model and data.

python scripts/weights_cost.py --path runs/demo-data
"""

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from simnpo_pl.benchmarks import DemoData
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import NPO, Objective, SimNPO
from simnpo_pl.runs.history import GradientWeights


class Clock:
    """Adds up the CPU time of functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - started

        return timed


def measure(objective: Objective, path: str, folder: Path, epochs: int) -> str:
    """A row of the table: CPU milliseconds per optimizer step."""
    weights, record, whole = Clock(), Clock(), Clock()
    objective.gradient_weights = weights.on(objective.gradient_weights)  # type: ignore[method-assign]
    callback = GradientWeights(folder)
    for hook in ("on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"):
        setattr(callback, hook, record.on(getattr(callback, hook)))
    data = DemoData(path=path, tokenizer=f"{path}/start", effective_batch=8, per_device_batch=8)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=TensorBoardLogger(str(folder)),
        log_every_n_steps=1,
        enable_checkpointing=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    whole.on(trainer.fit)(UnlearningModule(f"{path}/start", objective=objective), data)
    steps = trainer.global_step
    step, own, kept = (1000 * clock.seconds / steps for clock in (whole, weights, record))
    name = type(objective).__name__
    return f"| {name} | {steps} | {step:.1f} | {own:.2f} | {kept:.2f} | {100 * (own + kept) / step:.1f} % |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="runs/demo-data", help="the demo's data and models, made if they are missing")
    parser.add_argument("--folder", type=Path, default=Path("runs/weights-cost"), help="where weights.jsonl goes")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("CPU milliseconds per optimizer step of 8 + 8 rows, a model of a million parameters.\n")
    print("| objective | steps | whole step | weights | keeping and writing them | share |")
    print("|---|---|---|---|---|---|")
    for objective in (SimNPO(), NPO()):
        print(measure(objective, options.path, options.folder, options.epochs), flush=True)


if __name__ == "__main__":
    main()
