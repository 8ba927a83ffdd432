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
        On the CPU: `nll` `(B,)`, nats per token, the end included. Without the end: `exact_memorization` and
        `extraction_strength` `(B,)`, shares of the answer's tokens; if wanted, `min_k` and `min_k_plus_plus` `(B,)`,
        see `metrics.functional.lowest_share`. They are NaN if `nll` is not finite.
    """
    wanted = wanted or {}
    tokens, size = states.token_scores(wanted.get(MIN_K_PLUS_PLUS)), states.size
    # The one wait for a GPU: what follows is work on single rows. Float32 holds the number of a row exactly.
    logps, correct, standardized, rows = torch.cat([tokens, states.rows.float().unsqueeze(0)]).cpu()
    lengths = torch.bincount(rows.long(), minlength=size)
    nll = -torch.zeros(size, dtype=torch.float64).index_add(0, rows.long(), logps.double()).float() / lengths
    ends = ends.cpu()

    def by_row(function: Callable[[Tensor], float], values: Tensor, chosen: Tensor | None = None) -> Tensor:
        kept = zip(values.split(lengths.tolist()), (lengths - ends).clamp(min=0).tolist(), strict=True)
        wanted = [True] * size if chosen is None else chosen.tolist()
        scores = [function(part[:stop]) if row else torch.nan for (part, stop), row in zip(kept, wanted, strict=True)]
        return nll.new_tensor(scores).masked_fill(~nll.isfinite(), torch.nan)

    scores = {
        "nll": nll,
        "exact_memorization": by_row(exact_memorization, correct),
        "extraction_strength": by_row(extraction_strength, correct),
    }
    for name, values in ((MIN_K, logps), (MIN_K_PLUS_PLUS, standardized)):
        if name in wanted:
            scores[name] = by_row(lambda part: lowest_share(part, min_k), values, wanted[name])
    return scores
