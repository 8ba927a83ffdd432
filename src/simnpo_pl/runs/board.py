"""What a run adds to the logger besides scalars: truth ratios as a histogram, sample answers, settings with outcome."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.metrics.titles import tag
from simnpo_pl.utils import markdown

SAMPLES = 5


def log_evaluation(trainer: pl.Trainer, result: EvalResult, step: int) -> None:
    """Log truth ratios and sample answers of an evaluation at an optimizer step, if the logger takes these."""
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


def log_outcome(trainer: pl.Trainer, settings: dict[str, Any], metrics: Mapping[str, float]) -> None:
    """Log the settings of a run with its final metrics, by which TensorBoard compares runs."""
    if trainer.logger is None or not trainer.is_global_zero:
        return
    final = {f"final/{tag(name).replace('/', '_')}": value for name, value in metrics.items() if value == value}
    logger: Any = trainer.logger
    if hasattr(getattr(logger, "experiment", None), "add_hparams"):
        logger.log_hyperparams(settings, final)
    else:
        logger.log_hyperparams(settings)
        logger.log_metrics(final)


def _samples(result: EvalResult) -> str:
    """A few answers of every split, as a Markdown table."""
    cells = []
    taken = Counter[str]()
    for row in result.rows:
        if "generation" in row and taken[row["split"]] < SAMPLES:
            taken[row["split"]] += 1
            cells.append((row["split"], row["question"], row["answer"], row["generation"]))
    return markdown.table(["split", "question", "answer", "generated"], cells)
