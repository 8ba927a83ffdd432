"""What a run leaves in the logger beside its scalars: truth-ratio histograms, sample answers, settings with outcome."""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from simnpo_pl.utils import markdown
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.evaluation.tags import tag

SAMPLES = 5


def log_evaluation(trainer: pl.Trainer, result: EvalResult, step: int) -> None:
    """Log an evaluation's truth ratios as a histogram and sample answers as text, where the logger takes these.

    Args:
        trainer: Whose logger is written to; without one nothing happens.
        result: Of the evaluation.
        step: Optimizer steps behind the model.
    """
    if trainer.logger is None or not trainer.is_global_zero:
        return
    writer: Any = getattr(trainer.logger, "experiment", None)
    if hasattr(writer, "add_histogram"):
        ratios = [row["truth_ratio"] for row in result.rows if row["split"] == "forget" and "truth_ratio" in row]
        logs = torch.tensor([math.log10(ratio) for ratio in ratios if 0 < ratio < math.inf])
        if len(logs):
            writer.add_histogram("forget/log10_truth_ratio", logs, step)
    if hasattr(writer, "add_text"):
        writer.add_text("samples", _samples(result), step)


def log_outcome(trainer: pl.Trainer, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Log a run's settings with its final metrics, so that runs can be compared by them.

    Args:
        trainer: Whose logger is written to; without one nothing happens.
        settings: Nested settings of the run.
        metrics: Of the final model.
    """
    if trainer.logger is None or not trainer.is_global_zero:
        return
    flat = dict(_flat(settings))
    final = {f"final/{tag(name).replace('/', '_')}": value for name, value in metrics.items() if value == value}
    logger: Any = trainer.logger
    if hasattr(getattr(logger, "experiment", None), "add_hparams"):
        logger.log_hyperparams(flat, final)
    else:
        logger.log_hyperparams(flat)
        logger.log_metrics(final)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str | bool) else str(value)


def _samples(result: EvalResult) -> str:
    """A few answers of every split, as a Markdown table."""
    cells = []
    taken: dict[str, int] = {}
    for row in result.rows:
        if "generation" in row and taken.get(row["split"], 0) < SAMPLES:
            taken[row["split"]] = taken.get(row["split"], 0) + 1
            cells.append((row["split"], row["question"], row["answer"], row["generation"]))
    return markdown.table(["split", "question", "answer", "generated"], cells)
