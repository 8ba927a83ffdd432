"""Scores of answers under teacher forcing: from one forward pass, and from a backward pass for every row."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.metrics.functional import exact_memorization, extraction_strength, lowest_share
from simnpo_pl.models.logprobs import AnswerStates, Scorer
from simnpo_pl.utils.errors import UserError

MIN_K, MIN_K_PLUS_PLUS = ON_DEMAND = ("min_k", "min_k_plus_plus")
"""Scores that are computed only for rows where a metric reads them."""
GRADIENT_NORM = "gradient_norm"


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


def gradient_norms(model: Any, scorer: Scorer, rows: Mapping[str, Tensor]) -> Tensor:
    """Size of each answer's gradient with respect to the weights.

    Every weight counts, trained or not, and the model is in eval mode, so the number depends on the weights alone. It
    is computed in the weights' own type, without autocast.

    Args:
        model: Causal language model; its gradients, modes and flags are left as they were.
        scorer: Scores rows with that model.
        rows: `input_ids`, `labels` and `attention_mask` `(B, T)`; `end` `(B,)`, the number of tokens that end each
            answer and are left out of the loss.

    Returns:
        `(B,)` mean over the parameter tensors of the L2 norm of the gradient of the row's mean loss, nats per token.

    Raises:
        UserError: The weights are sharded.
    """
    # With an adapter, the gradient of the base's weights is that of the weights it would be merged into.
    parameters = [p for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name]
    if any(hasattr(p, "full_tensor") for p in parameters):
        raise UserError("--eval.gradnorm needs whole weights on each device: run it on one device or by ddp")
    trained, training = [p.requires_grad for p in parameters], model.training
    norms = []
    device = rows["input_ids"].device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        try:
            model.eval()
            for parameter in parameters:
                parameter.requires_grad_(True)
            for row in range(len(rows["input_ids"])):
                width = int(rows["attention_mask"][row].sum())
                # Copies, because tensors made in inference mode cannot take part in a backward pass.
                names = ("input_ids", "labels", "attention_mask")
                states = scorer({"row": {name: rows[name][row : row + 1, :width].clone() for name in names}})["row"]
                kept = max(0, len(states.labels) - int(rows["end"][row]))
                loss = -states.token_logps()[:kept].mean()
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                sizes = [gradient.float().norm() for gradient in found if gradient is not None]
                norms.append(torch.stack(sizes).mean().detach())
        finally:
            model.train(training)
            for parameter, wanted in zip(parameters, trained, strict=True):
                parameter.requires_grad_(wanted)
    return torch.stack(norms)
