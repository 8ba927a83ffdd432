"""Forget quality of two halves of the forget rows: the shortest and the longest, or the first and the second."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from simnpo_pl.metrics.functional import ForgetQualityResult, answer_probability, forget_quality
from simnpo_pl.runs.record import Row, Run
from simnpo_pl.utils.errors import UserError


class Half(NamedTuple):
    """One half of the forget rows."""

    name: str
    unlearned: list[float]
    """Truth ratios of the model, row by row."""
    retrained: list[float]
    """Truth ratios of the retrained model on the same rows."""
    quality: ForgetQualityResult
    probability: float
    """Mean answer probability exp(-nll) of the model."""


def by_length(run: Run) -> dict[str, list[int]]:
    """Row indices of the shortest and the longest answers, in scored tokens; of like long ones the first are shorter.

    The evaluated model is one that unlearned all rows; only the evaluation is halved (SimNPO paper, figure 2).

    Raises:
        UserError: The run logged no lengths.
    """
    lengths = {row["index"]: row["length"] for row in run.weights if row["epoch"] == 1}
    if not lengths:
        raise UserError(f"{run.folder} holds no weights.jsonl, which has the answers' lengths: give a run of fit")
    order = sorted(lengths, key=lambda index: (lengths[index], index))
    half = len(order) // 2
    return {"shortest": sorted(order[:half]), "longest": sorted(order[half:])}


def by_order(rows: int) -> dict[str, list[int]]:
    """Row indices of the first and the second half of some rows, as a start model saw and did not see them."""
    half = rows // 2
    return {"strong": list(range(half)), "weak": list(range(half, rows))}


def qualities(rows: Sequence[Row], retrained: Sequence[Row], halves: dict[str, list[int]]) -> list[Half]:
    """Forget quality of each half.

    Args:
        rows: Evaluated rows of the model, as in `rows.jsonl`.
        retrained: The same of the retrained model.
        halves: Name of a half to its row indices.

    Raises:
        UserError: A row was not evaluated by one of the models.
    """
    ours = {row["index"]: row for row in rows if row["split"] == "forget"}
    theirs = {row["index"]: row for row in retrained if row["split"] == "forget"}
    found = []
    for name, indices in halves.items():
        ratios, others = _ratios(ours, indices, "the model"), _ratios(theirs, indices, "the retrained model")
        losses = torch.tensor([ours[index]["answer_nll"] for index in indices], dtype=torch.float64)
        quality = forget_quality(torch.tensor(ratios), torch.tensor(others))
        found.append(Half(name, ratios, others, quality, answer_probability(losses).mean().item()))
    return found


def _ratios(rows: dict[int, Row], indices: Sequence[int], model: str) -> list[float]:
    missing = [index for index in indices if rows.get(index, {}).get("truth_ratio") is None]
    if missing:
        raise UserError(
            f"forget quality of halves: {model} has no truth ratio of forget row {missing[0]}; evaluate the rows that "
            "were trained on, with --eval.retrained or --eval.retain_log"
        )
    return [float(rows[index]["truth_ratio"]) for index in indices]
