"""Per-row scores of one forward pass: everything teacher forcing says of an answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from simnpo_pl.logprobs import AnswerStates
from simnpo_pl.metrics.functional import exact_memorization, extraction_strength, lowest_share

MIN_K, MIN_K_PLUS_PLUS = ON_DEMAND = ("min_k", "min_k_plus_plus")
"""Scores that are made only for the rows where they are read."""


@dataclass(frozen=True)
class Scoring:
    """How answers are scored.

    Args:
        eos_id: Id of the EOS that ends an answer, unless it was cut; None where rows have none.
        min_k: Part of the tokens that Min-K% and Min-K%++ average.
    """

    eos_id: int | None = None
    min_k: float = 0.4


@torch.no_grad()
def score_rows(states: AnswerStates, scoring: Scoring, wanted: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Scores of B answers.

    Args:
        states: Scored positions of the answers.
        scoring: How.
        wanted: Name of a score on demand to the rows `(B,)` bool where it is read.

    Returns:
        `nll` `(B,)`, nats per token with the EOS; and without the EOS `exact_memorization` and `extraction_strength`
        `(B,)`, shares of the answer's tokens, and where wanted `min_k` and `min_k_plus_plus` `(B,)`, see
        `metrics.functional.lowest_share`. Where `nll` is not finite, the others are NaN.
    """
    wanted = wanted or {}
    tokens = states.token_scores(wanted.get(MIN_K_PLUS_PLUS))
    nll = -states.sum_rows(tokens.logps) / states.lengths()
    kept = without_eos(states, scoring.eos_id)
    lengths = states.sum_rows(kept.float()).long().tolist()

    def by_row(function: Callable[[Tensor], float], values: Tensor, rows: Tensor | None = None) -> Tensor:
        parts = values[kept].cpu().split(lengths)
        skipped = torch.zeros(len(lengths), dtype=torch.bool) if rows is None else ~rows.cpu()
        scores = [torch.nan if skip else function(part) for part, skip in zip(parts, skipped.tolist(), strict=True)]
        return nll.new_tensor(scores).masked_fill(~nll.isfinite(), torch.nan)

    def lowest(values: Tensor) -> float:
        return lowest_share(values, scoring.min_k)

    scores = {
        "nll": nll,
        "exact_memorization": by_row(exact_memorization, tokens.correct),
        "extraction_strength": by_row(extraction_strength, tokens.correct),
    }
    for name, values in ((MIN_K, tokens.logps), (MIN_K_PLUS_PLUS, tokens.standardised)):
        if name in wanted:
            scores[name] = by_row(lowest, values, wanted[name])
    return scores


def without_eos(states: AnswerStates, eos_id: int | None) -> Tensor:
    """`(S,)` bool, the scored positions other than the EOS."""
    return torch.ones_like(states.labels, dtype=torch.bool) if eos_id is None else states.labels != eos_id
