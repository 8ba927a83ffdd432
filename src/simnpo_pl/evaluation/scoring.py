"""Per-row scores of one forward pass: everything teacher forcing says of an answer."""

import torch
from torch import Tensor

from simnpo_pl.logprobs import AnswerStates
from simnpo_pl.metrics.functional import exact_memorization, extraction_strength


@torch.no_grad()
def score_rows(states: AnswerStates) -> dict[str, Tensor]:
    """Scores of B answers.

    Args:
        states: Scored positions of the answers, the EOS last in each.

    Returns:
        `nll` `(B,)`, nats per token with the EOS; `exact_memorization` and `extraction_strength` `(B,)`,
        shares of the answer's tokens without the EOS.
    """
    tokens = states.token_scores()
    lengths = states.lengths()
    nll = -states.sum_rows(tokens.logps) / lengths
    correct = [row[:-1] for row in tokens.correct.cpu().split(lengths.long().tolist())]
    # Where the loss is not a number, no token is right or wrong.
    broken = ~nll.isfinite()
    exact = nll.new_tensor([exact_memorization(row) for row in correct])
    strength = nll.new_tensor([extraction_strength(row) for row in correct])
    return {
        "nll": nll,
        "exact_memorization": exact.masked_fill(broken, torch.nan),
        "extraction_strength": strength.masked_fill(broken, torch.nan),
    }
