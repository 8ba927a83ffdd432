"""The output head of a language model: from hidden states to logits, and to what is read of them without holding all.

Logits are float32. They pass through in chunks of the vocabulary for the log-probs of labels, in chunks of tokens for
any other function; what the backward pass needs of them is kept within a budget, else computed again.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_BUDGET = 2**25
"""Logits kept for the backward pass (tokens times vocabulary); beyond it they are computed again."""

CPU_CHUNK, GPU_CHUNK = 2**20, 2**25
"""Logits at work at once: on a CPU what fits its cache."""

TokenFunction = Callable[..., Tensor]
"""`(logits (s, V), *others (s, ...)) -> (s,)`: each value from its own token alone."""


@dataclass(frozen=True)
class Head:
    """Maps hidden states to float32 logits.

    Args:
        module: The model's own map, such as its `lm_head`; an identity where logits stand for hidden states.
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
        logits = self.module(hidden if self.scale == 1 else hidden * self.scale).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def logps(self, hidden: Tensor, predictors: Tensor, labels: Tensor) -> Tensor:
        """Log-probs of labels.

        Args:
            hidden: `(U, D)`.
            predictors: `(S,)` number of the hidden state that predicts each label; several may share one.
            labels: `(S,)` token ids.

        Returns:
            `(S,)` nats.
        """
        if not self.is_plain:
            return self.per_token(_label_logps, hidden[predictors], labels)
        return _Logps.apply(self._ready(hidden), *self._parameters, self.cap, predictors, labels)

    @torch.no_grad()
    def scores(self, hidden: Tensor, predictors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs `(S,)` of labels and whether each is the most probable token, without gradient; see `logps`."""
        if not self.is_plain:
            hidden = hidden[predictors]
            hits = self.per_token(lambda logits, y: logits.argmax(dim=-1) == y, hidden, labels)
            return self.per_token(_label_logps, hidden, labels), hits
        linear, hidden = _Linear(*self._parameters, self.cap), self._ready(hidden)
        norm, own = _Norm(hidden), _Labels(predictors, labels)
        best = torch.zeros_like(norm.high, dtype=torch.long)
        for tokens in linear.chunks(hidden):
            logits = linear(hidden, tokens)
            high, place = logits.max(dim=-1)
            best = torch.where(high > norm.high, place + tokens.start, best)
            norm.add(logits, high)
            own.add(logits, tokens)
        return own.logits - norm.log_sum[predictors], best[predictors] == labels

    def per_token(self, function: TokenFunction, hidden: Tensor, *others: Tensor) -> Tensor:
        """Values of a function of every token's logits; gradient flows to hidden states and head.

        Args:
            function: See `TokenFunction`; it gets a chunk of the logits and of each of the others.
            hidden: `(S, D)`.
            others: `(S, ...)` each, without gradient.

        Returns:
            `(S,)`.
        """
        step = max(1, LOGITS_BUDGET // (4 * self.vocabulary))
        if len(hidden) * self.vocabulary <= LOGITS_BUDGET:
            return function(self(hidden), *others)
        if self.is_plain:
            return _PerToken.apply(self._ready(hidden), *self._parameters, self.cap, function, step, *others)

        def values(hidden: Tensor, *others: Tensor) -> Tensor:
            return function(self(hidden), *others)

        chunks = zip(*(tensor.split(step) for tensor in (hidden, *others)), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([values(*chunk) for chunk in chunks])
        return torch.cat([checkpoint(values, *chunk, use_reentrant=False) for chunk in chunks])

    @property
    def is_plain(self) -> bool:
        """Whether the map is a matrix at hand: not sharded, quantised, adapted or watched by hooks."""
        module = self.module
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return False
        return type(module.weight) in (nn.Parameter, Tensor) and module.weight.is_floating_point()

    @property
    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.module.weight, self.module.bias

    def _ready(self, hidden: Tensor) -> Tensor:
        """Hidden states scaled and in the precision of the product."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return (hidden if self.scale == 1 else hidden * self.scale).to(dtype)


class _Linear(NamedTuple):
    """The map to logits as a matrix."""

    weight: Tensor
    """`(V, D)`."""
    bias: Tensor | None
    """`(V,)`."""
    cap: float | None

    def __call__(self, hidden: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Float32 logits `(U, v)` of a part of the vocabulary."""
        bias = None if self.bias is None else self.bias[tokens].to(hidden.dtype)
        logits = nn.functional.linear(hidden, self.weight[tokens].to(hidden.dtype), bias)
        return self.capped(logits.float())

    def capped(self, logits: Tensor) -> Tensor:
        """Apply the soft cap in place."""
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def before_cap(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient by the logits before the cap, from that by the capped ones, in place."""
        return gradient if self.cap is None else gradient.mul_(1 - (logits / self.cap).square())

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Parts of the vocabulary to work on one after the other."""
        at_once = CPU_CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
        # Narrower products are slow, and so are kernels whose width is no multiple of 128.
        step, size = max(512, at_once // max(1, len(hidden)) // 128 * 128), len(self.weight)
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))


class _Norm:
    """Sums the exponentials of U tokens' logits over a vocabulary that comes in chunks."""

    def __init__(self, hidden: Tensor) -> None:
        self.high = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        self.total = torch.zeros_like(self.high)
        self._work: Tensor | None = None

    def add(self, logits: Tensor, high: Tensor) -> None:
        """Take logits `(U, v)` with their maxima `(U,)`."""
        high = torch.maximum(self.high, high)
        if self._work is None or self._work.shape != logits.shape:
            # One block of memory for all chunks: fresh pages cost more than the sums.
            self._work = torch.empty_like(logits)
        terms = torch.sub(logits, high.unsqueeze(1), out=self._work).exp_()
        self.total = self.total * (self.high - high).exp_() + terms.sum(dim=-1)
        self.high = high

    @property
    def log_sum(self) -> Tensor:
        """`(U,)` log of the sum."""
        return self.high + self.total.log()


class _Labels:
    """The logits of S labels, and where their gradients belong, over a vocabulary that comes in chunks.

    They are the logits that are normalized: one computed more exactly could exceed the sum it is divided by.
    """

    def __init__(self, predictors: Tensor, labels: Tensor) -> None:
        self.predictors, self.labels = predictors, labels
        self.logits = torch.zeros_like(labels, dtype=torch.float32)

    def add(self, logits: Tensor, tokens: slice) -> None:
        """Take logits `(U, v)`."""
        inside, place = self._places(tokens)
        self.logits = torch.where(inside, logits[self.predictors, place], self.logits)

    def add_gradient(self, by_logit: Tensor, tokens: slice, gradient: Tensor) -> None:
        """Add the gradient `(S,)` by the labels' logits to that by a chunk of logits `(U, v)`, in place."""
        inside, place = self._places(tokens)
        values = gradient.to(by_logit.dtype) * inside
        by_logit.index_put_((self.predictors, place), values, accumulate=True)

    def _places(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Which labels are in a chunk, and their place in it; no selection, for which a GPU would have to wait."""
        inside = (self.labels >= tokens.start) & (self.labels < tokens.stop)
        return inside, (self.labels - tokens.start).clamp(0, tokens.stop - tokens.start - 1)


class _Gradients:
    """Gradients of a linear map and its input, gathered from gradients of logits."""

    def __init__(self, ctx: Any, linear: _Linear, hidden: Tensor, weight: Tensor) -> None:
        self.linear, self.input = linear, hidden
        self.hidden = torch.zeros_like(hidden, dtype=torch.float32)
        self.weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        self.bias = torch.zeros_like(linear.bias) if linear.bias is not None and ctx.needs_input_grad[2] else None

    def add(self, by_logit: Tensor, rows: slice = slice(None), tokens: slice = slice(None), first: bool = True) -> None:
        """Take the gradient `(u, v)` by the logits, before the cap, of some hidden states and tokens.

        Args:
            by_logit: The gradient.
            rows: Which hidden states.
            tokens: Which part of the vocabulary.
            first: Whether these tokens come for the first time.
        """
        low, hidden = by_logit.to(self.input.dtype), self.input[rows]
        weight = self.linear.weight[tokens].to(low.dtype)
        _add_product(self.hidden[rows], low, weight, first=False)
        if self.weight is not None:
            _add_product(self.weight[tokens], low.t(), hidden, first)
        if self.bias is not None:
            self.bias[tokens] += by_logit.sum(dim=0)

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.hidden.to(self.input.dtype), self.weight, self.bias


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add `left @ right` to a total, or set it where this is the first term."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
    else:
        product = left @ right
        total.copy_(product) if first else total.add_(product)


class _Logps(torch.autograd.Function):
    """Log-probs of labels, the vocabulary in chunks: see `Head.logps`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        predictors: Tensor,
        labels: Tensor,
    ) -> Tensor:
        linear, norm, own = _Linear(weight, bias, cap), _Norm(hidden), _Labels(predictors, labels)
        keep, kept = any(ctx.needs_input_grad) and len(hidden) * len(weight) <= LOGITS_BUDGET, []
        for tokens in linear.chunks(hidden):
            logits = linear(hidden, tokens)
            norm.add(logits, logits.amax(dim=-1))
            own.add(logits, tokens)
            if keep:
                kept.append(logits)
        ctx.cap = cap
        ctx.save_for_backward(hidden, weight, bias, predictors, labels, norm.log_sum, *kept)
        return own.logits - norm.log_sum[predictors]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, predictors, labels, log_sum, *kept = ctx.saved_tensors
        linear, own = _Linear(weight, bias, ctx.cap), _Labels(predictors, labels)
        gradients = _Gradients(ctx, linear, hidden, weight)
        by_state = torch.zeros_like(log_sum).index_add_(0, predictors, gradient)
        work: Tensor | None = None
        for number, tokens in enumerate(linear.chunks(hidden)):
            logits = kept[number] if kept else linear(hidden, tokens)
            work = torch.empty_like(logits) if work is None or work.shape != logits.shape else work
            by_logit = torch.sub(logits, log_sum.unsqueeze(1), out=work)
            by_logit.exp_().mul_(-by_state.unsqueeze(1))
            own.add_gradient(by_logit, tokens, gradient)
            gradients.add(linear.before_cap(by_logit, logits), tokens=tokens)
        return *gradients.result(), None, None, None


class _PerToken(torch.autograd.Function):
    """A function of every token's logits, the tokens in chunks: see `Head.per_token`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float | None,
        function: TokenFunction,
        step: int,
        *others: Tensor,
    ) -> Tensor:
        ctx.cap, ctx.function, ctx.step = cap, function, step
        device = hidden.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.autocast = torch.autocast(device, dtype, enabled)
        ctx.save_for_backward(hidden, weight, bias, *others)
        # Cast once: every chunk of tokens reads the whole weight.
        linear = _Linear(weight.to(hidden.dtype), bias, cap)
        chunks = zip(*(tensor.split(step) for tensor in (hidden, *others)), strict=True)
        return torch.cat([function(linear(rows), *rest) for rows, *rest in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *others = ctx.saved_tensors
        linear = _Linear(weight.to(hidden.dtype), bias, ctx.cap)
        gradients = _Gradients(ctx, linear, hidden, weight)
        for start in range(0, len(hidden), ctx.step):
            rows = slice(start, start + ctx.step)
            logits = linear(hidden[rows]).requires_grad_()
            with torch.enable_grad(), ctx.autocast:
                values = ctx.function(logits, *(other[rows] for other in others))
            (by_logit,) = torch.autograd.grad(values, logits, gradient[rows])
            gradients.add(linear.before_cap(by_logit, logits.detach()), rows, first=start == 0)
        return *gradients.result(), None, None, None, *(None for _ in others)


def _label_logps(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
