"""From rows of tokens to answer log-probs: the only shift, mask and log-softmax in the package.

Hidden states are taken at the scored positions alone, the head is applied to those, and the
log-softmax runs in float32, in chunks where tokens times vocabulary is large.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from simnpo_pl.data.tokenization import IGNORE_INDEX
from simnpo_pl.layers import layer_outputs
from simnpo_pl.packing import ATTENTION, layout_of, packed_hidden

LOGITS_BUDGET = 2**25
"""Logits held at once (scored tokens times vocabulary); above it the head runs in chunks."""

_log = logging.getLogger(__name__)

Rows = Mapping[str, Tensor]
"""`input_ids`, `labels` (-100 where not scored) and `attention_mask`, each `(B, T)`, right-padded."""


class AnswerLogps(NamedTuple):
    """Log-likelihood of B answers."""

    total: Tensor
    """`(B,)` sum of log-probs over the scored tokens, nats, at most 0."""
    length: Tensor
    """`(B,)` number of scored tokens, float."""

    @property
    def mean(self) -> Tensor:
        """`(B,)` nats per token; 0 for a row without a scored token."""
        return self.total / self.length.clamp(min=1)


class TokenScores(NamedTuple):
    """What teacher forcing says of every scored token."""

    logps: Tensor
    """`(S,)` log-prob of the label, nats."""
    correct: Tensor
    """`(S,)` whether the label is the most probable token, bool."""
    standardised: Tensor
    """`(S,)` log-prob of the label less the mean log-prob of a token drawn from the model, over its standard deviation;
    NaN where it was not asked for."""


@dataclass(frozen=True)
class LayerStates:
    """Hidden states of one layer at the answers' own tokens, not at the positions that predict them."""

    hidden: Tensor
    """`(L, D)` what the layer gives, float32, in row order."""
    rows: Tensor
    """`(L,)` row of each token."""
    size: int
    """B."""

    def row_means(self, values: Tensor, crossed: bool = False) -> Tensor:
        """Means of values `(L,)` within rows: `(B,)`.

        Args:
            values: One a token.
            crossed: Divide the sum of each row by the number of tokens of every row, and take the mean of that.
        """
        sums = values.new_zeros(self.size).index_add(0, self.rows, values)
        shares = 1 / torch.bincount(self.rows, minlength=self.size).clamp(min=1)
        return sums * (shares.mean() if crossed else shares)

    def between(self, start: int, end: int) -> "LayerStates":
        """Those of rows `start` to `end` alone."""
        inside = (self.rows >= start) & (self.rows < end)
        return LayerStates(self.hidden[inside], self.rows[inside] - start, end - start)


@dataclass(frozen=True)
class AnswerStates:
    """The S scored positions of B rows, flat and in row order."""

    hidden: Tensor
    """`(S, D)` hidden states, or `(S, V)` logits where `head` is the identity."""
    labels: Tensor
    """`(S,)` token to predict."""
    rows: Tensor
    """`(S,)` row of each position."""
    size: int
    """B."""
    width: int
    """T, the padded length of the rows."""
    head: nn.Module
    """Maps `hidden` to logits."""
    vocabulary: int
    """V."""
    layers: Mapping[int, LayerStates] = field(default_factory=dict)
    """Number of each layer that was asked for, from 0, to its states."""

    def logits(self) -> Tensor:
        """`(S, V)` logits in float32."""
        return self.head(self.hidden).float()

    def token_logps(self) -> Tensor:
        """`(S,)` log-prob of each label, nats."""
        return torch.cat([self._label_logps(h, y) for h, y in self._chunks()])

    def logps(self) -> AnswerLogps:
        """Log-likelihood of every row's answer."""
        return AnswerLogps(self.sum_rows(self.token_logps()), self.lengths())

    def lengths(self) -> Tensor:
        """`(B,)` number of scored tokens, float."""
        return self.sum_rows(torch.ones_like(self.labels, dtype=torch.float32))

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum values `(S,)` of scored positions within each row: `(B,)`."""
        return values.new_zeros(self.size).index_add(0, self.rows, values)

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of logits `(S, V)` against distributions `(S, V)`: `(S,)` nats."""
        return logits.logsumexp(dim=-1) - (target * logits).sum(dim=-1)

    @torch.no_grad()
    def token_scores(self, standardise: Tensor | None = None) -> TokenScores:
        """Log-prob and correctness of every scored token, without gradient.

        Args:
            standardise: `(B,)` bool, the rows whose log-probs are also standardised over the vocabulary.
        """
        logps, correct, standardised = [], [], []
        chosen = torch.zeros_like(self.labels, dtype=torch.bool) if standardise is None else standardise[self.rows]
        for (hidden, labels), inside in zip(self._chunks(), chosen.split(self._step), strict=True):
            logits = self.head(hidden).float()
            picked = _pick(logits, labels)
            logps.append(picked)
            correct.append(logits.argmax(dim=-1) == labels)
            standardised.append(torch.full_like(picked, torch.nan))
            if inside.any():
                standardised[-1][inside] = _standardise(picked[inside], logits[inside])
        return TokenScores(torch.cat(logps), torch.cat(correct), torch.cat(standardised))

    @property
    def _step(self) -> int:
        return max(1, LOGITS_BUDGET // self.vocabulary)

    def _chunks(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.hidden.split(self._step), self.labels.split(self._step), strict=True))

    def _label_logps(self, hidden: Tensor, labels: Tensor) -> Tensor:
        def head_logps(hidden: Tensor, labels: Tensor) -> Tensor:
            return _pick(self.head(hidden).float(), labels)

        if len(self.labels) * self.vocabulary <= LOGITS_BUDGET or not torch.is_grad_enabled():
            return head_logps(hidden, labels)
        # Logits of a chunk are computed again in the backward pass instead of being kept.
        return checkpoint(head_logps, hidden, labels, use_reentrant=False)


def _pick(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of logits `(..., V)`: `(...)`, nats."""
    logps = one.log_softmax(dim=-1)
    return (logps.exp() * (logps - other.log_softmax(dim=-1))).sum(dim=-1)


def _standardise(picked: Tensor, logits: Tensor) -> Tensor:
    """Log-probs `(S,)` against mean and variance of the log-prob under the distributions of logits `(S, V)`."""
    logps = logits.log_softmax(dim=-1)
    # A token without probability adds 0 to both moments, not 0 times infinity.
    probs, finite = logps.exp(), logps.masked_fill(logps == -torch.inf, 0.0)
    mean = (probs * finite).sum(dim=-1)
    variance = (probs * (finite - mean.unsqueeze(-1)) ** 2).sum(dim=-1)
    return (picked - mean) / variance.clamp(min=1e-6).sqrt()


def join(parts: list[Rows]) -> dict[str, Tensor]:
    """Stack right-padded rows of different widths into one batch `(sum of B, max of T)`."""
    width = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    return {
        key: torch.cat([nn.functional.pad(p[key], (0, width - p[key].shape[1]), value=value) for p in parts])
        for key, value in fill.items()
    }


def scored_targets(rows: Rows) -> tuple[Tensor, Tensor]:
    """Token that each position predicts, and whether it is scored: `(B, T)` both."""
    # Position t predicts the label at t + 1.
    targets = nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    return targets, (targets != IGNORE_INDEX) & (rows["attention_mask"] != 0)


def answer_lengths(rows: Rows) -> Tensor:
    """`(B,)` number of scored tokens, float."""
    return scored_targets(rows)[1].sum(dim=-1).float()


class Scorer:
    """Turns rows into `AnswerStates` with one causal language model.

    Packs rows where the model's attention allows it and reads hidden states where its head is a
    plain map of them; whether both hold is tried on two short rows, and a model that computes
    something else (recurrent layers, attention of its own, scaled or capped logits) takes the
    padded path through its whole forward.

    Args:
        model: A causal language model from transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.body: nn.Module = model.base_model
        self.head: Any = model.get_output_embeddings()
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.packs = self._pack_agrees()

    def __call__(self, parts: Mapping[str, Rows], layers: Collection[int] = ()) -> dict[str, AnswerStates]:
        """Scored positions of several sets of rows, from one forward pass.

        Args:
            parts: Rows by name, such as forget and retain.
            layers: Numbers of the layers, from 0, whose states are wanted, too.

        Returns:
            `AnswerStates` under the same names.
        """
        states = self._states(join(list(parts.values())), layers)
        bounds = [0]
        for rows in parts.values():
            bounds.append(bounds[-1] + rows["input_ids"].shape[0])
        result = {}
        for (name, rows), start, end in zip(parts.items(), bounds, bounds[1:], strict=False):
            inside = slice(*torch.searchsorted(states.rows, states.rows.new_tensor([start, end])).tolist())
            result[name] = AnswerStates(
                hidden=states.hidden[inside],
                labels=states.labels[inside],
                rows=states.rows[inside] - start,
                size=end - start,
                width=rows["input_ids"].shape[1],
                head=states.head,
                vocabulary=self.vocabulary,
                layers={number: layer.between(start, end) for number, layer in states.layers.items()},
            )
        return result

    def all_logits(self, rows: Rows) -> Tensor:
        """`(B, T, V)` float32 logits at every position, padding included."""
        output = self.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False)
        return output.logits.float()

    def _states(self, rows: Rows, layers: Collection[int] = ()) -> AnswerStates:
        input_ids, mask, size = rows["input_ids"], rows["attention_mask"], rows["input_ids"].shape[0]
        targets, scored = scored_targets(rows)
        answers = rows["labels"] != IGNORE_INDEX
        with layer_outputs(self.model, layers) as outputs:
            if self.packs:
                layout = layout_of(mask)
                hidden = packed_hidden(self.body, input_ids, layout)
                hidden = hidden[scored.reshape(-1)[layout.cells]]
                head = self.head
                answers = answers & (mask != 0)
                inside = answers.reshape(-1)[layout.cells].unsqueeze(0)
            else:
                output = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
                hidden, head = output.logits[scored], nn.Identity()
                inside = answers
        token_rows = answers.nonzero()[:, 0]
        return AnswerStates(
            hidden=hidden,
            labels=targets[scored],
            rows=scored.nonzero()[:, 0],
            size=size,
            width=input_ids.shape[1],
            head=head,
            vocabulary=self.vocabulary,
            layers={n: LayerStates(outputs[n][inside].float(), token_rows, size) for n in layers},
        )

    @torch.no_grad()
    def _pack_agrees(self) -> bool:
        """Whether packed rows give the model's own logits; says so once where they do not."""
        config: Any = self.model.config
        usual, training = getattr(config, "_attn_implementation", None), self.model.training
        if usual not in ("sdpa", ATTENTION) or getattr(self.head, "weight", None) is None:
            return False
        self.model.eval()
        device: Any = self.head.weight.device
        # Two rows of unlike lengths: a state that leaks from one row to the next would show.
        ids = (torch.arange(12, device=device) * 7 + 3).reshape(2, 6) % self.vocabulary
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], device=device)
        try:
            with torch.autocast(device.type, enabled=False):
                expected = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                self.model.set_attn_implementation(ATTENTION)
                packed = self.head(packed_hidden(self.body, ids, layout_of(mask)))
            error = (packed - expected[mask.bool()]).abs().max()
            tolerance = 1e-4 if packed.dtype == torch.float32 else 5e-2
            agrees = bool(error <= tolerance * expected.abs().max().clamp(min=1.0))
        except (TypeError, ValueError, RuntimeError, AttributeError):
            agrees = False
        finally:
            self.model.train(training)
        if not agrees:
            self.model.set_attn_implementation("sdpa")
            _log.info("%s: rows are padded, not packed (its forward differs)", type(self.model).__name__)
        return agrees
