"""Scores of answers from one teacher-forced forward pass."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simnpo_pl.metrics.functional import exact_memorization, extraction_strength, lowest_share
from simnpo_pl.models.logprobs import AnswerStates

MIN_K, MIN_K_PLUS_PLUS = ON_DEMAND = ("min_k", "min_k_plus_plus")
"""Scores that are computed only for rows where a metric reads them."""


@torch.no_grad()
def score_rows(
    states: AnswerStates, ends: Tensor, min_k: float = 0.4, wanted: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Scores of B answers.

    Args:
        states: Scored positions of the answers.
        ends: `(B,)` number of tokens that end each answer, see `TokenRow.end`.
        min_k: Share of the tokens that Min-K% and Min-K%++ average.
        wanted: Name of a score on demand to the rows `(B,)` bool for which it is computed.

    Returns:
        `nll` `(B,)`, nats per token, the end included. Without the end: `exact_memorization` and
        `extraction_strength` `(B,)`, shares of the answer's tokens; if wanted, `min_k` and `min_k_plus_plus` `(B,)`,
        see `metrics.functional.lowest_share`. They are NaN if `nll` is not finite.
    """
    wanted = wanted or {}
    tokens = states.token_scores(wanted.get(MIN_K_PLUS_PLUS))
    nll = -states.sum_rows(tokens.logps) / states.lengths()
    kept = without_end(states, ends)
    lengths = states.sum_rows(kept.float()).long().tolist()

    def by_row(function: Callable[[Tensor], float], values: Tensor, rows: Tensor | None = None) -> Tensor:
        parts = values[kept].cpu().split(lengths)
        chosen = [True] * len(lengths) if rows is None else rows.tolist()
        scores = [function(part) if row else torch.nan for part, row in zip(parts, chosen, strict=True)]
        return nll.new_tensor(scores).masked_fill(~nll.isfinite(), torch.nan)

    scores = {
        "nll": nll,
        "exact_memorization": by_row(exact_memorization, tokens.correct),
        "extraction_strength": by_row(extraction_strength, tokens.correct),
    }
    for name, values in ((MIN_K, tokens.logps), (MIN_K_PLUS_PLUS, tokens.standardized)):
        if name in wanted:
            scores[name] = by_row(lambda part: lowest_share(part, min_k), values, wanted[name])
    return scores


def without_end(states: AnswerStates, ends: Tensor) -> Tensor:
    """`(S,)` bool: the scored positions except the last `ends` `(B,)` of each row."""
    stops = states.lengths().long().cumsum(0) - ends
    return torch.arange(len(states.rows), device=stops.device) < stops[states.rows]
