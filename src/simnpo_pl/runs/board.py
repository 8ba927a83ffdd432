"""What a run adds to the logger: truth ratios as a histogram, sample answers, settings with the final metrics."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.metrics.titles import tag
from simnpo_pl.utils import markdown

SAMPLES = 5


def log_evaluation(trainer: pl.Trainer, result: EvalResult, step: int) -> None:
    """Give TensorBoard the truth ratios and sample answers of an evaluation at an optimizer step."""
    if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
        return
    ratios = [row["truth_ratio"] for row in result.rows if row["split"] == "forget" and "truth_ratio" in row]
    if logs := [math.log10(ratio) for ratio in ratios if 0 < ratio < math.inf]:
        trainer.logger.experiment.add_histogram("forget/log10_truth_ratio", torch.tensor(logs), step)
    trainer.logger.experiment.add_text("samples", _samples(result), step)


def log_outcome(trainer: pl.Trainer, record: Mapping[str, Any]) -> None:
    """Log the settings of a run, from its results.json, with its final metrics, by which TensorBoard compares runs.

    In TensorBoard start, retrained and final model are lines in the charts of the epochs' metrics.
    """
    logger: Any = trainer.logger
    if logger is None:
        return
    models = {model: record[model]["metrics"] for model in ("start", "retrained", "final") if record.get(model)}
    if not isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(record["settings"])
        logger.log_metrics({f"final/{tag(name).replace('/', '_')}": v for name, v in models["final"].items() if v == v})
        return
    for model, metrics in models.items():
        known = {tag(name): value for name, value in metrics.items() if value is not None and value == value}
        # A folder of its own is a line of its own.
        line = TensorBoardLogger(logger.log_dir, name="", version=model)
        if model == "final":
            line.log_hyperparams(_settings(record), known, step=0)
        else:
            line.log_metrics(known, step=0)
        line.log_metrics(known, max(1, trainer.global_step))
        line.experiment.close()


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """What runs are compared by: model, objective and its settings, weights, learning rate, seed."""
    model = record["settings"]["model"]
    found = {"model": model["name"], "lr": model["lr"], "seed": record["seed"]}
    if "objective" in record:
        objective = dict(record["objective"])
        found |= {"objective": objective.pop("name"), **objective.pop("settings"), **objective}
    return {name: value for name, value in found.items() if value is not None}


def _samples(result: EvalResult) -> str:
    """A few answers of every split, as a Markdown table."""
    cells = []
    taken = Counter[str]()
    for row in result.rows:
        if "generation" in row and taken[row["split"]] < SAMPLES:
            taken[row["split"]] += 1
            cells.append((row["split"], row["question"], row["answer"], row["generation"]))
    return markdown.table(["split", "question", "answer", "generated"], cells)
