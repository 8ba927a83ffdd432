"""The output head of a language model: from hidden states to float32 logits, of which only a part is held at once.

`_Logps` is ours because `torch.nn.functional.linear_cross_entropy` (torch 2.13) returns log-probs in bfloat16 under
autocast, and took 9 % more processor time with its best chunk size (700 tokens, 576 hidden dimensions, vocabulary of
49,152). `_PerToken` is ours because `torch.utils.checkpoint` over the same chunks took 335 MB more (600 tokens, 1,024
and 65,536): every chunk has its own gradient of the weights.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_BUDGET, GPU_LOGITS_BUDGET = 2**25, 2**27
"""Logits kept for the backward pass (tokens times vocabulary); if there are more, they are computed again."""

CPU_CHUNK, GPU_CHUNK = 2**20, 2**25
"""Logits at work at once: on a CPU what fits its cache."""
TokenFunction = Callable[..., Tensor]
"""`(logits (s, V), *others (s, ...)) -> (s,)` or `(s, k)`: each value from its own token alone."""


@dataclass(frozen=True)
class Head:
    """Maps hidden states to float32 logits.

    Args:
        module: The model's own map, such as its `lm_head`; an identity where logits replace hidden states.
        vocabulary: V.
        scale: Factor of the logits (Cohere, Granite).
        cap: Soft cap, `cap * tanh(logits / cap)` (Gemma); None for none.
    """

    module: Any
    vocabulary: int
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `(U, V)` of hidden states `(U, D)`."""
        return self._capped(self.module(self._scaled(hidden)).float())

    def logps(self, hidden: Tensor, predictors: Tensor, labels: Tensor) -> Tensor:
        """Log-probs of labels.

        Args:
            hidden: `(U, D)`.
            predictors: `(S,)` index of the hidden state that predicts each label; several may share one.
            labels: `(S,)` token ids.

        Returns:
            `(S,)` nats.
        """
        if not self.is_plain or self.cap is not None:
            return self.per_token(_label_logps, hidden[predictors], labels)
        return _Logps.apply(self._ready(hidden), self.module.weight, self.module.bias, predictors, labels)

    @torch.no_grad()
    def scores(self, hidden: Tensor, predictors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs `(S,)` of labels and whether each is the most probable token, without gradient; see `logps`."""
        if not self.is_plain or self.cap is not None:
            logps, hits = self.per_token(_label_scores, hidden[predictors], labels).unbind(dim=-1)
            return logps, hits.bool()
        parameters = self.module.weight, self.module.bias
        logps, _, best = _label_softmax(self._ready(hidden), *parameters, predictors, labels, find_best=True)
        return logps, best[predictors] == labels

    def per_token(self, function: TokenFunction, hidden: Tensor, *others: Tensor) -> Tensor:
        """Values of a function of every token's logits; gradient flows to hidden states and head.

        Args:
            function: See `TokenFunction`; it gets a chunk of the logits and of each of the others.
            hidden: `(S, D)`.
            others: `(S, ...)` each, without gradient.
        """
        if len(hidden) * self.vocabulary <= LOGITS_BUDGET:
            return function(self(hidden), *others)
        step = max(1, per_token_chunk(hidden.device.type != "cpu") // self.vocabulary)
        if self.is_plain:

            def capped(logits: Tensor, *others: Tensor) -> Tensor:
                return function(self._capped(logits), *others)

            weight, bias = self.module.weight, self.module.bias
            return _PerToken.apply(self._ready(hidden), weight, bias, capped, step, *others)

        def values(hidden: Tensor, *others: Tensor) -> Tensor:
            return function(self(hidden), *others)

        chunks = zip(*(tensor.split(step) for tensor in (hidden, *others)), strict=True)
        return torch.cat([checkpoint(values, *chunk, use_reentrant=False) for chunk in chunks])

    @property
    def is_plain(self) -> bool:
        """Whether the map is a matrix of floats in memory: not sharded, quantized, adapted or with hooks."""
        module = self.module
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return False
        return type(module.weight) in (nn.Parameter, Tensor) and module.weight.is_floating_point()

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.scale == 1 else hidden * self.scale

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _ready(self, hidden: Tensor) -> Tensor:
        """Hidden states scaled and in the precision of the product."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return self._scaled(hidden).to(dtype)


def per_token_chunk(gpu: bool) -> int:
    """Logits at work at once where whole distributions are read; several copies of them are made."""
    return GPU_CHUNK if gpu else LOGITS_BUDGET // 4


def _label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def _label_scores(logits: Tensor, labels: Tensor) -> Tensor:
    hits = logits.argmax(dim=-1) == labels
    return torch.stack([_label_logps(logits, labels), hits.float()], dim=-1)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: slice = slice(None)) -> Tensor:
    """Float32 logits `(U, v)` of a part of the vocabulary."""
    bias = None if bias is None else bias[tokens].to(hidden.dtype)
    return nn.functional.linear(hidden, weight[tokens].to(hidden.dtype), bias).float()


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Parts of the vocabulary, one after the other."""
    at_once = CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
    # Narrower products are slow, and so are kernels whose width is no multiple of 128.
    step, size = max(512, at_once // max(1, len(hidden)) // 128 * 128), len(weight)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _label_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    predictors: Tensor,
    labels: Tensor,
    kept: list[Tensor] | None = None,
    find_best: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of labels `(S,)`, logs of the sums of exponentials `(U,)` and most probable tokens `(U,)`.

    A label's logit is one of those that are summed: one computed more exactly could exceed the sum.
    The best are zeros unless asked for; `kept` receives the logits of each chunk of the vocabulary.
    """
    high = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    total, best = torch.zeros_like(high), torch.zeros_like(high, dtype=torch.long)
    own = torch.zeros_like(labels, dtype=torch.float32)
    work: Tensor | None = None
    for tokens in _chunks(hidden, weight):
        logits = _logits(hidden, weight, bias, tokens)
        if find_best:
            top, place = logits.max(dim=-1)
            best = torch.where(top > high, place + tokens.start, best)
        else:
            top = logits.amax(dim=-1)
        top = torch.maximum(high, top)
        # One block of memory for all chunks: fresh pages cost more than the sums.
        work = torch.empty_like(logits) if work is None or work.shape != logits.shape else work
        terms = torch.sub(logits, top.unsqueeze(1), out=work).exp_()
        total = total * (high - top).exp_() + terms.sum(dim=-1)
        high = top
        inside, place = _places(labels, tokens)
        own = torch.where(inside, logits[predictors, place], own)
        if kept is not None:
            kept.append(logits)
    log_sum = high + total.log()
    return own - log_sum[predictors], log_sum, best


def _places(labels: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
    """Which labels are in a chunk, and their place in it; no selection, for which a GPU would have to wait."""
    inside = (labels >= tokens.start) & (labels < tokens.stop)
    return inside, (labels - tokens.start).clamp(0, tokens.stop - tokens.start - 1)


class _Logps(torch.autograd.Function):
    """Log-probs of labels, the vocabulary in chunks: see `Head.logps`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, predictors: Tensor, labels: Tensor
    ) -> Tensor:
        kept: list[Tensor] = []
        budget = LOGITS_BUDGET if hidden.device.type == "cpu" else GPU_LOGITS_BUDGET
        keep = any(ctx.needs_input_grad) and len(hidden) * len(weight) <= budget
        logps, log_sum, _ = _label_softmax(hidden, weight, bias, predictors, labels, kept if keep else None)
        ctx.save_for_backward(hidden, weight, bias, predictors, labels, log_sum, *kept)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, predictors, labels, log_sum, *kept = ctx.saved_tensors
        by_state = torch.zeros_like(log_sum).index_add_(0, predictors, gradient)

        def blocks() -> Iterator[tuple[slice, slice, Tensor]]:
            work: Tensor | None = None
            for number, tokens in enumerate(_chunks(hidden, weight)):
                logits = kept[number] if kept else _logits(hidden, weight, bias, tokens)
                work = torch.empty_like(logits) if work is None or work.shape != logits.shape else work
                by_logit = torch.sub(logits, log_sum.unsqueeze(1), out=work)
                by_logit.exp_().mul_(-by_state.unsqueeze(1))
                inside, place = _places(labels, tokens)
                by_logit.index_put_((predictors, place), gradient.to(by_logit.dtype) * inside, accumulate=True)
                yield slice(None), tokens, by_logit

        return *_gradients(ctx, hidden, weight, weight.dtype, bias, blocks()), None, None


class _PerToken(torch.autograd.Function):
    """A function of every token's logits, the tokens in chunks: see `Head.per_token`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: TokenFunction,
        step: int,
        *others: Tensor,
    ) -> Tensor:
        ctx.function, ctx.step = function, step
        device = hidden.device.type
        ctx.autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(hidden, weight, bias, *others)
        # Cast once: every chunk of tokens reads all weights.
        weight = weight.to(hidden.dtype)
        chunks = zip(*(tensor.split(step) for tensor in (hidden, *others)), strict=True)
        return torch.cat([function(_logits(rows, weight, bias), *rest) for rows, *rest in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *others = ctx.saved_tensors
        low = weight.to(hidden.dtype)

        def blocks() -> Iterator[tuple[slice, slice, Tensor]]:
            for start in range(0, len(hidden), ctx.step):
                rows = slice(start, start + ctx.step)
                logits = _logits(hidden[rows], low, bias).requires_grad_()
                with torch.enable_grad(), ctx.autocast:
                    values = ctx.function(logits, *(other[rows] for other in others))
                yield rows, slice(None), torch.autograd.grad(values, logits, gradient[rows])[0]

        return *_gradients(ctx, hidden, low, weight.dtype, bias, blocks()), None, None, *(None for _ in others)


def _gradients(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    blocks: Iterable[tuple[slice, slice, Tensor]],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients by the first three inputs of an autograd function from gradients by blocks of the logits.

    Each block: hidden states, part of the vocabulary, and the gradient `(u, v)` by their logits.
    """
    by_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    by_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
    by_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
    for rows, tokens, by_logit in blocks:
        left = by_logit.to(hidden.dtype)
        _add_product(by_hidden[rows], left, weight[tokens].to(hidden.dtype))
        if by_weight is not None:
            _add_product(by_weight[tokens], left.t(), hidden[rows])
        if by_bias is not None:
            by_bias[tokens] += by_logit.sum(dim=0)
    return by_hidden.to(hidden.dtype), by_weight, by_bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
