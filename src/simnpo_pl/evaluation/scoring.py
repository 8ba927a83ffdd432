"""Per-row scores of one forward pass: everything teacher forcing says of an answer."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simnpo_pl.metrics.functional import exact_memorization, extraction_strength, lowest_share
from simnpo_pl.models.logprobs import AnswerStates

MIN_K, MIN_K_PLUS_PLUS = ON_DEMAND = ("min_k", "min_k_plus_plus")
"""Scores that are made only for the rows where they are read."""


@torch.no_grad()
def score_rows(
    states: AnswerStates, ends: Tensor, min_k: float = 0.4, wanted: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Scores of B answers.

    Args:
        states: Scored positions of the answers.
        ends: `(B,)` number of tokens that end each answer, see `TokenRow.end`.
        min_k: Part of the tokens that Min-K% and Min-K%++ average.
        wanted: Name of a score on demand to the rows `(B,)` bool where it is read.

    Returns:
        `nll` `(B,)`, nats per token with the end; and without the end `exact_memorization` and `extraction_strength`
        `(B,)`, shares of the answer's tokens, and where wanted `min_k` and `min_k_plus_plus` `(B,)`, see
        `metrics.functional.lowest_share`. Where `nll` is not finite, the others are NaN.
    """
    wanted = wanted or {}
    tokens = states.token_scores(wanted.get(MIN_K_PLUS_PLUS))
    nll = -states.sum_rows(tokens.logps) / states.lengths()
    kept = without_end(states, ends)
    lengths = states.sum_rows(kept.float()).long().tolist()

    def by_row(function: Callable[[Tensor], float], values: Tensor, rows: Tensor | None = None) -> Tensor:
        parts = values[kept].cpu().split(lengths)
        skipped = torch.zeros(len(lengths), dtype=torch.bool) if rows is None else ~rows.cpu()
        scores = [torch.nan if skip else function(part) for part, skip in zip(parts, skipped.tolist(), strict=True)]
        return nll.new_tensor(scores).masked_fill(~nll.isfinite(), torch.nan)

    def lowest(values: Tensor) -> float:
        return lowest_share(values, min_k)

    scores = {
        "nll": nll,
        "exact_memorization": by_row(exact_memorization, tokens.correct),
        "extraction_strength": by_row(extraction_strength, tokens.correct),
    }
    for name, values in ((MIN_K, tokens.logps), (MIN_K_PLUS_PLUS, tokens.standardised)):
        if name in wanted:
            scores[name] = by_row(lowest, values, wanted[name])
    return scores


def without_end(states: AnswerStates, ends: Tensor) -> Tensor:
    """`(S,)` bool, the scored positions other than the last `ends` `(B,)` of each row."""
    stops = states.lengths().long().cumsum(0) - ends
    return torch.arange(len(states.rows), device=stops.device) < stops[states.rows]
