"""What a run adds to the logger: truth ratios as a histogram, sample answers, settings with the final metrics."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
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


def log_outcome(trainer: pl.Trainer, record: Mapping[str, Any]) -> None:
    """Log the settings of a run, from its results.json, with its final metrics, by which TensorBoard compares runs.

    In TensorBoard start, retrained and final model are lines in the charts of the epochs' metrics.
    """
    if trainer.logger is None:
        return
    models = {model: record[model]["metrics"] for model in ("start", "retrained", "final") if record.get(model)}
    logger: Any = trainer.logger
    writer: Any = getattr(logger, "experiment", None)
    if not hasattr(writer, "add_hparams"):
        logger.log_hyperparams(record["settings"])
        logger.log_metrics({f"final/{tag(name).replace('/', '_')}": v for name, v in models["final"].items() if v == v})
        return
    from torch.utils.tensorboard.summary import hparams

    for model, metrics in models.items():
        known = {tag(name): value for name, value in metrics.items() if value is not None and value == value}
        # A folder of its own is a line of its own.
        with type(writer)(str(Path(logger.log_dir) / model)) as lines:
            for name, value in known.items():
                for step in (0, max(1, trainer.global_step)):
                    lines.add_scalar(name, value, step)
            if model == "final":
                for part in hparams(_settings(record), known):
                    lines.file_writer.add_summary(part)


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What runs are compared by: model, objective and its settings, weights, learning rate, seed."""
    model = record["settings"]["model"]
    found = {"model": model["name"], "lr": model["lr"], "seed": record["seed"]}
    if "objective" in record:
        objective = dict(record["objective"])
        found |= {"objective": objective.pop("name"), **objective.pop("settings"), **objective}
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in found.items() if v is not None}


def _samples(result: EvalResult) -> str:
    """A few answers of every split, as a Markdown table."""
    cells = []
    taken = Counter[str]()
    for row in result.rows:
        if "generation" in row and taken[row["split"]] < SAMPLES:
            taken[row["split"]] += 1
            cells.append((row["split"], row["question"], row["answer"], row["generation"]))
    return markdown.table(["split", "question", "answer", "generated"], cells)
