"""Generated answers, greedy or sampled: a batched loop with key-value cache that drops rows as they finish.

The loop is ours because `generate` of transformers runs every row of a batch until the longest ends, and its draws
depend on the batch. A trial shows once for each model whether the loop gives the model's own logits; if not, prompts go
through `generate` of transformers without padding.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from operator import add
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from simnpo_pl.models.decoding import Repeated
from simnpo_pl.models.packing import MISFITS, raise_if_machine
from simnpo_pl.models.sharding import any_process, is_sharded
from simnpo_pl.utils.errors import UserError

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""Takes logits `(R, V)`, indices of their prompts `(R,)` and the step from 0; returns the next tokens `(R,)`."""

Way = Callable[[Any, Sequence[Sequence[int]], Sequence[int], Sequence[int], Choose], list[list[int]]]
"""Takes what `generate` does, with a largest number of new tokens for each prompt."""

# Settings of a generation_config that change the next token, with their neutral values.
_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("min_p", "stop_strings", "max_time", "min_new_tokens", "bad_words_ids", "suppress_tokens")),
    **dict.fromkeys(("begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id")),
    "exponential_decay_length_penalty": None,
    **{"do_sample": False, "temperature": 1, "top_k": 50, "top_p": 1, "typical_p": 1, "num_beams": 1},
    **{"repetition_penalty": 1, "no_repeat_ngram_size": 0, "min_length": 0, "guidance_scale": 1},
}
_ways: "WeakKeyDictionary[Any, Way]" = WeakKeyDictionary()
_told: "WeakSet[Any]" = WeakSet()
"""Models whose limit of positions has been reported."""


def most_probable(logits: Tensor, rows: Tensor, step: int) -> Tensor:
    return logits.argmax(dim=-1)


class Sampler:
    """Draws each next token from the model's distribution; samples do not depend on the other rows of a batch.

    Args:
        draws: `(B, T)` numbers in [0, 1), one for each prompt and step, see `draws_of`.
        temperature: Above 0; 1 is the model's own distribution.
    """

    def __init__(self, draws: Tensor, temperature: float = 1.0) -> None:
        self.draws = draws
        self.temperature = temperature

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """The token whose interval of the cumulative probabilities contains a row's number."""
        shares = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        # Copied to the device once.
        self.draws = self.draws.to(shares)
        drawn = self.draws[rows, step].unsqueeze(-1) * shares[:, -1:]
        return torch.searchsorted(shares, drawn, right=True).squeeze(-1).clamp(max=shares.shape[-1] - 1)


def draws_of(seed: int, row: int, sample: int, steps: int) -> Tensor:
    """`(steps,)` numbers in [0, 1) for one sample of one row."""
    return torch.from_numpy(np.random.default_rng([seed, row, sample]).random(steps))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    choose: Choose = most_probable,
) -> list[list[int]]:
    """Continuation of each prompt, token by token, from the model's unchanged logits.

    A row also ends where a model without rotary positions has no position left.

    Args:
        model: Causal language model in eval mode.
        prompts: Token ids, one list per prompt; none may be empty.
        max_new_tokens: Largest number of new tokens.
        eos_ids: A row ends at the first of these, which is not part of the result.
        choose: Picks the next tokens.

    Returns:
        New token ids of each prompt.

    Raises:
        UserError: A prompt fills the model's positions, or no way of decoding gives the model's own logits.
    """
    limits = _limits(model, prompts, max_new_tokens)
    kind = next(model.parameters()).device.type
    # Lightning's autocast rounds all weights again in every call: here once for all tokens.
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=True):
        return _way_of(model)(model, prompts, limits, eos_ids, choose)


def _limits(model: Any, prompts: Sequence[Sequence[int]], wanted: int) -> list[int]:
    """Largest number of new tokens of each prompt for which the model has positions."""
    config, name = model.config.get_text_config(), type(model).__name__
    positions, longest = getattr(config, "max_position_embeddings", None), max(map(len, prompts))
    if not positions or longest + wanted <= positions:
        return [wanted] * len(prompts)
    rotary = bool(getattr(config, "rope_parameters", None))
    if longest >= positions and not rotary:
        raise UserError(f"{name} takes {positions} tokens, a prompt has {longest}: shorten the prompts")
    if model not in _told:
        _told.add(model)
        found = "runs past them and may be poor" if rotary else "ends there"
        rank_zero_warn(
            f"{name} takes {positions} tokens, the longest prompt with {wanted} new ones has more: its answer {found}; "
            "lower --eval.max_new_tokens or shorten the prompts"
        )
    return [wanted if rotary else min(wanted, positions - len(prompt)) for prompt in prompts]


def _batched(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    eos_ids: Sequence[int],
    choose: Choose,
    repeat: bool = False,
) -> list[list[int]]:
    """All prompts at once, padded on the left; rows leave the batch as they end, or when half have if steps repeat."""
    device = next(model.parameters()).device
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = pad([torch.tensor(prompt) for prompt in prompts]).to(device)
    mask = pad([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts]).to(device)
    done: list[list[int]] = [[] for _ in prompts]
    running, rows = list(range(len(prompts))), torch.arange(len(prompts), device=device)
    stop, sharded, ended = frozenset(eos_ids), is_sharded(model), set[int]()
    cache, repeated = DynamicCache(config=model.config), None
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for step in range(max(limits)):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, cache_name: cache}
        logits = repeated(ids) if repeated else model(**inputs, use_cache=True, logits_to_keep=1).logits
        token = choose(logits[:, -1], rows, step)
        # Only here does the host wait for the device.
        for row, value in zip(running, token.tolist(), strict=True):
            if row not in ended and value not in stop:
                done[row].append(value)
            if value in stop or step + 1 == limits[row]:
                ended.add(row)
        keep = [place for place, row in enumerate(running) if row not in ended]
        if not keep:
            break
        if len(keep) < len(running) and (repeated is None or 2 * len(keep) <= len(running)):
            running, kept = [running[place] for place in keep], torch.tensor(keep).to(device, non_blocking=True)
            rows, mask, positions, token = rows[kept], mask[kept], positions[kept], token[kept]
            # The one method to select rows that every kind of cache layer has.
            (repeated or cache).reorder_cache(cast(torch.LongTensor, kept))
        if repeat and step == 0 and not sharded and Repeated.suits(model, cache):
            width, last = ids.shape[1] + max(limits) - 1, max(map(add, map(len, prompts), limits)) - 1
            repeated = Repeated(model, {cache_name: cache}, mask, positions[:, -1:], width, last)
        ids = token.unsqueeze(1)
        if repeated is None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        if sharded:
            any_process(True, device)
    # Processes whose rows still run need this one's shard of the weights.
    while sharded and any_process(False, device):
        model(input_ids=ids[:1, :1], use_cache=False, logits_to_keep=1)
    return done


class _Chosen(LogitsProcessor):
    """Allows the chosen token alone, for prompts `rows` `(R,)` of `length` tokens each."""

    def __init__(self, choose: Choose, rows: Tensor, length: int) -> None:
        self.choose, self.rows, self.length = choose, rows, length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.choose(scores, self.rows, input_ids.shape[1] - self.length)
        return torch.full_like(scores, -torch.inf).scatter(1, token.unsqueeze(1), 0.0)


def _by_transformers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    eos_ids: Sequence[int],
    choose: Choose,
    alone: bool = False,
    use_cache: bool = True,
) -> list[list[int]]:
    """Prompts of one length at a time, which need no padding, or each alone, by `generate` of transformers."""
    device = next(model.parameters()).device
    done: list[list[int]] = [[] for _ in prompts]
    groups: dict[tuple[int, int], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault((len(prompt), row * alone), []).append(row)
    waiting, sharded = list(groups.values()), is_sharded(model)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        while any_process(bool(waiting), device) if sharded else waiting:
            # A process without prompts left joins the passes of the others.
            rows = waiting.pop() if waiting else [0]
            length = len(prompts[rows[0]])
            ids = torch.tensor([list(prompts[row]) for row in rows], device=device)
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limits[rows[0]],
                do_sample=False,
                use_cache=use_cache,
                eos_token_id=list(eos_ids) or None,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([_Chosen(choose, torch.tensor(rows, device=device), length)]),
                synced_gpus=sharded,
            )
            for row, new in zip(rows, found[:, length:].tolist(), strict=True):
                done[row] = new[: next((i for i, token in enumerate(new) if token in eos_ids), len(new))]
    finally:
        model.generation_config = own
    return done


_WAYS: list[tuple[Way, str]] = [
    (partial(_batched, repeat=True), ""),
    (_batched, ""),
    (_by_transformers, "prompts of one length at a time"),
    (partial(_by_transformers, alone=True), "one prompt at a time"),
    (partial(_by_transformers, use_cache=False), "without key-value cache, which is very slow"),
]


def _way_of(model: Any) -> Way:
    """The fastest way that gives the model's own logits; tried once, with a warning where it is not the batched one."""
    if model in _ways:
        return _ways[model]
    name, config = type(model).__name__, model.generation_config
    changed = [
        f"{key}={value}"[:60]
        for key, neutral in _SETTINGS.items()
        if (value := getattr(config, key, None)) is not None and value != neutral
    ]
    if changed:
        rank_zero_warn(
            f"generation_config of {name} sets {', '.join(changed)}: ignored; answers come from the model's "
            "unchanged logits, greedy or at the temperature that the command was given"
        )
    agrees = _trial(model)
    # Without a graph, steps on the same memory gain nothing.
    for way, words in _WAYS if next(model.parameters()).device.type == "cuda" else _WAYS[1:]:
        if agrees(way):
            if words:
                rank_zero_warn(
                    f"{name} generates {words}, with generate of transformers: a batch of padded prompts does not "
                    "give the model's own logits"
                )
            _ways[model] = way
            return way
    raise UserError(
        f"{name}: generating token by token does not give the logits of one pass over the whole text; measure without "
        "answers: --eval.generate_rows 0"
    )


def _trial(model: Any) -> Callable[[Way], bool]:
    """Says of a way of decoding whether it gives the logits that four short prompts give alone.

    The prompts have different lengths, and one of them ends early.
    """
    config = model.config.get_text_config()
    device, lengths, steps = next(model.parameters()).device, (4, 2, 6, 4), (2, 4, 4, 4)
    end = int(config.vocab_size) - 1
    # More tokens than a window has that only the model's own code knows, as GPT-Neo's; all rows end long before.
    most = min(512, getattr(config, "max_position_embeddings", None) or 512) - max(lengths)
    ids = (torch.arange(sum(lengths) + len(lengths) * max(steps), device=device) * 7 + 3) % end
    prompts = ids[: sum(lengths)].split(lengths)
    forced = ids[sum(lengths) :].view(len(lengths), max(steps))
    expected = []
    with torch.autocast(device.type, enabled=False):
        for prompt, new, count in zip(prompts, forced, steps, strict=True):
            whole = torch.cat([prompt, new[: count - 1]]).unsqueeze(0)
            expected.append(model(input_ids=whole, use_cache=False).logits[0, -count:])
            new[count - 1] = end

    def agrees(way: Way) -> bool:
        found: list[list[Tensor]] = [[] for _ in prompts]

        def record(logits: Tensor, rows: Tensor, step: int) -> Tensor:
            for row, own in zip(rows.tolist(), logits, strict=True):
                found[row].append(own)
            return forced[rows, step]

        try:
            with torch.autocast(device.type, enabled=False):
                way(model, [prompt.tolist() for prompt in prompts], [most] * len(prompts), [end], record)
            same = all(map(_close, found, expected))
        except MISFITS as error:
            raise_if_machine(error)
            same = False
        return not any_process(not same, device) if is_sharded(model) else same

    return agrees


def _close(found: list[Tensor], expected: Tensor) -> bool:
    # Skip masked logits and NaN.
    real = expected.abs() < 1e30
    ours, theirs = torch.stack(found[: len(expected)])[real].float(), expected[real].float()
    # Above the rounding of TF32 and bfloat16, below the effect of attention to padding or of a lost state.
    tolerance = 0.01 if expected.dtype == torch.float32 else 0.2
    return bool((ours - theirs).norm() <= tolerance * (theirs - theirs.mean()).norm())
