"""Trains small Llama models from scratch, for benchmarks that make their own start and retrained models."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import collate
from simnpo_pl.models.logprobs import Scorer


def new_llama(seed: int, tokenizer: Any = None, **config: Any) -> LlamaForCausalLM:
    """An untrained model with these settings of `LlamaConfig` and, of a tokenizer, the special tokens.

    The global random state is left as it was. The default `initializer_range` of 0.02 is meant for wide models.
    """
    special: Any = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**special, **config))


def batches_of(rows: Sequence[TokenRow], orders: Iterable[Sequence[int]], size: int) -> list[list[TokenRow]]:
    """The rows in batches; `orders` are the row numbers of each epoch."""
    return [
        [rows[index] for index in order[start : start + size]]
        for order in orders
        for start in range(0, len(order), size)
    ]


def train(
    model: LlamaForCausalLM,
    batches: Iterable[Sequence[TokenRow]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: Callable[[int], float] = lambda step: 1.0,
    clip: float = float("inf"),
) -> None:
    """Minimizes the cross-entropy of the rows' scored tokens, a step per batch; leaves the model in eval mode.

    By AdamW without weight decay; `schedule` gives the factor of the learning rate at each step, from 0, and `clip` is
    the largest norm of the gradient.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    scorer = Scorer(model)
    model.train()
    for batch in batches:
        loss = -scorer({"rows": collate(batch)})["rows"].token_logps().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
    model.eval()
