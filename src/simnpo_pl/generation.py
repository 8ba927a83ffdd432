"""Answers, greedy or sampled: a batched loop with key-value cache that drops rows as they finish."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from simnpo_pl.sharding import any_process, is_sharded

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""Of logits `(R, V)`, the prompts they belong to `(R,)` and the step from 0: the next tokens `(R,)`."""


def most_probable(logits: Tensor, rows: Tensor, step: int) -> Tensor:
    """Token of the highest logit."""
    return logits.argmax(dim=-1)


class Sampler:
    """Draws each next token from the model's distribution.

    A draw depends on nothing but its own number between 0 and 1 and that distribution, so samples do not change with
    the rows that are generated beside them.

    Args:
        draws: `(B, T)` numbers from 0 to below 1, one for each prompt and step, see `draws_of`.
        temperature: Above 0; 1 is the model's own distribution.
    """

    def __init__(self, draws: Tensor, temperature: float = 1.0) -> None:
        self.draws = draws
        self.temperature = temperature

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """The token in whose share of the cumulated probabilities a row's number falls."""
        shares = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        drawn = self.draws.to(shares)[rows, step].unsqueeze(-1) * shares[:, -1:]
        return torch.searchsorted(shares, drawn, right=True).squeeze(-1).clamp(max=shares.shape[-1] - 1)


def draws_of(seed: int, row: int, sample: int, steps: int) -> Tensor:
    """`(steps,)` numbers from 0 to below 1 that belong to one sample of one row."""
    return torch.from_numpy(np.random.default_rng([seed, row, sample]).random(steps))


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int = 0,
) -> list[list[int]]:
    """Most probable continuation of each prompt, token by token; see `generate`."""
    return generate(model, prompts, max_new_tokens, eos_ids, most_probable, pad_id)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    choose: Choose,
    pad_id: int = 0,
) -> list[list[int]]:
    """Continuation of each prompt, token by token.

    Args:
        model: Causal language model in eval mode.
        prompts: Token ids, one list a prompt; none may be empty.
        max_new_tokens: Tokens at most.
        eos_ids: A row ends at the first of these, which is left out of the result.
        choose: Picks the next tokens.
        pad_id: Any id of the vocabulary; fills the left, never attended to.

    Returns:
        New token ids of each prompt.
    """
    device = next(model.parameters()).device
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    ids, mask = _left_pad(prompts, pad_id, device)
    done: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts), device=device)
    stop = torch.tensor(list(eos_ids), device=device)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    sharded = is_sharded(model)
    for step in range(max_new_tokens):
        logits = _last_logits(model, ids, mask, positions, {cache_name: cache})
        token = choose(logits, rows, step)
        running = ~torch.isin(token, stop)
        for row, value in zip(rows[running].tolist(), token[running].tolist(), strict=True):
            done[row].append(value)
        if step + 1 == max_new_tokens or not running.any():
            break
        if not running.all():
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, mask, positions, token = rows[keep], mask[keep], positions[keep], token[keep]
        ids = token.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if sharded:
            any_process(True, device)
    # Processes whose rows still run need this one's share of the weights.
    while sharded and any_process(False, device):
        model(input_ids=ids[:1, :1], use_cache=False, logits_to_keep=1)
    return done


def _last_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: dict[str, Any]) -> Tensor:
    """`(B, V)` logits of the last position."""
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **cache
    )
    return output.logits[:, -1]


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
