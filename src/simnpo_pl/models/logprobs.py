"""From rows of tokens to answer log-probs; the head is in `models/head.py`.

It is applied to the hidden states of the scored positions alone.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simnpo_pl.data.tokenization import IGNORE_INDEX
from simnpo_pl.models.forward import Forward
from simnpo_pl.models.head import Head, TokenFunction
from simnpo_pl.models.layers import layer_outputs
from simnpo_pl.models.packing import Layout, layout_of, stacked
from simnpo_pl.utils.errors import UserError

Rows = Mapping[str, Any]
"""`input_ids`, `labels` (-100 where not scored) and `attention_mask`, each `(B, T)`, right-padded; maybe a `Plan`."""
PLAN = "plan"
"""Key of the rows' `Plan`."""


class Plan(NamedTuple):
    """Which states of B rows are read, for which labels; made on the CPU, so that the host waits for no GPU."""

    used: Tensor
    """`(U,)` indices of the states that predict a label."""
    predictors: Tensor
    """`(S,)` index in `used` of the state that predicts each label."""
    labels: Tensor
    """`(S,)` token to predict."""
    rows: Tensor
    """`(S,)` row of each label."""
    answers: Tensor
    """`(L,)` indices of the states of the answers' own tokens."""
    answer_rows: Tensor
    """`(L,)` row of each of them."""
    layout: Layout | None = None
    """Of packed rows, whose states the indices are for."""


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


@dataclass(frozen=True)
class LayerStates:
    """Outputs of one layer at the answers' own tokens, not at the positions that predict them."""

    hidden: Tensor
    """`(L, D)` float32, in row order."""
    rows: Tensor
    """`(L,)` row of each token."""
    size: int
    """B."""

    def row_means(self, values: Tensor, crossed: bool = False) -> Tensor:
        """Means of values `(L,)` within rows: `(B,)`.

        Args:
            values: One per token.
            crossed: Divide the sum of each row by the number of tokens of every row, and take the mean of that.
        """
        sums = values.new_zeros(self.size).index_add(0, self.rows, values)
        counts = values.new_zeros(self.size).index_add(0, self.rows, torch.ones_like(values))
        shares = 1 / counts.clamp(min=1)
        return sums * (shares.mean() if crossed else shares)


@dataclass(frozen=True)
class AnswerStates:
    """The S scored positions of B rows, flat and in row order."""

    hidden: Tensor
    """`(U, D)` hidden states, or `(U, V)` logits where the head is the identity."""
    predictors: Tensor
    """`(S,)` index of the hidden state that predicts each label; rows that begin alike share theirs."""
    labels: Tensor
    """`(S,)` token to predict."""
    rows: Tensor
    """`(S,)` row of each position."""
    size: int
    """B."""
    head: Head
    """Maps hidden states to logits of V tokens."""
    layers: Mapping[int, LayerStates] = field(default_factory=dict)
    """Number of each requested layer, from 0, to its states."""
    known_logps: Tensor | None = None
    """`(S,)` log-prob of each label where `score_together` has computed them; nats."""

    def logits(self) -> Tensor:
        """`(S, V)` logits in float32, all at once; see `per_token`."""
        return self.head(self.hidden[self.predictors])

    def per_token(self, function: TokenFunction, *others: "AnswerStates") -> Tensor:
        """`(S,)` values of a function of each position's logits, with gradient; the logits come in chunks.

        Args:
            function: Of logits `(s, V)` and labels `(s,)` of some positions, and the logits `(s, V)` of each other
                model there; returns `(s,)`, each value from its own position alone.
            others: Other models' states of the same rows; no gradient flows to them.
        """

        def with_others(logits: Tensor, labels: Tensor, *hidden: Tensor) -> Tensor:
            with torch.no_grad():
                targets = [other.head(states) for other, states in zip(others, hidden, strict=True)]
            return function(logits, labels, *targets)

        hidden = [states.hidden[states.predictors] for states in (self, *others)]
        return self.head.per_token(with_others, hidden[0], self.labels, *hidden[1:])

    def token_logps(self) -> Tensor:
        """`(S,)` log-prob of each label, nats."""
        if self.known_logps is not None:
            return self.known_logps
        return self.head.logps(self.hidden, self.predictors, self.labels)

    def logps(self) -> AnswerLogps:
        """Log-likelihood of every row's answer."""
        return AnswerLogps(self.sum_rows(self.token_logps()), self.lengths())

    @torch.no_grad()
    def token_scores(self, standardize: Tensor | None = None) -> Tensor:
        """Scores of every scored token under teacher forcing, without gradient.

        Args:
            standardize: `(B,)` bool, the rows whose log-probs are also standardized over the vocabulary.

        Returns:
            `(3, S)` float32: log-prob of the label, nats; 1 if the label is the most probable token, else 0; (log-prob
            of the label - mean) / standard deviation of the log-prob of a token drawn from the model, NaN where not
            requested.
        """
        logps, correct = self.head.scores(self.hidden, self.predictors, self.labels)
        standardized = torch.full_like(logps, torch.nan)
        if standardize is not None:
            chosen = standardize.to(self.rows.device)[self.rows].nonzero()[:, 0]
            hidden = self.hidden[self.predictors[chosen]]
            standardized[chosen] = self.head.per_token(_standardized, hidden, self.labels[chosen])
        return torch.stack([logps, correct.float(), standardized])

    def lengths(self) -> Tensor:
        """`(B,)` number of scored tokens, float."""
        return self.sum_rows(torch.ones_like(self.labels, dtype=torch.float32))

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum values `(S,)` of scored positions within each row: `(B,)`."""
        # In float64: the difference of two long answers' sums may be smaller than float32's rounding. MPS has none.
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        sums = values.new_zeros(self.size, dtype=wide).index_add(0, self.rows, values.to(wide))
        return sums.to(values.dtype)


def score_together(parts: Mapping[str, AnswerStates], names: Collection[str]) -> dict[str, AnswerStates]:
    """The same parts, with the log-probs of those named from one pass through the head.

    The gradient of the head's weights, as large as these, is then held once, not once per part.
    """
    chosen = [parts[name] for name in names]
    if len(chosen) < 2 or not chosen[0].head.is_plain:
        return dict(parts)
    starts = torch.tensor([0, *(len(states.hidden) for states in chosen[:-1])]).cumsum(0).tolist()
    logps = chosen[0].head.logps(
        torch.cat([states.hidden for states in chosen]),
        torch.cat([states.predictors + start for states, start in zip(chosen, starts, strict=True)]),
        torch.cat([states.labels for states in chosen]),
    )
    own = logps.split([len(states.labels) for states in chosen])
    made = {name: replace(parts[name], known_logps=part) for name, part in zip(names, own, strict=True)}
    return {**parts, **made}


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits `(..., V)` against distributions `(..., V)`: `(...)` nats."""
    return logits.logsumexp(dim=-1) - (target * logits).sum(dim=-1)


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of logits `(..., V)`: `(...)`, nats."""
    logps = one.log_softmax(dim=-1)
    return (logps.exp() * (logps - other.log_softmax(dim=-1))).sum(dim=-1)


def jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of logits `(..., V)`: `(...)`, nats, at most log 2."""
    first, second = one.log_softmax(dim=-1), other.log_softmax(dim=-1)
    mean = torch.logaddexp(first, second) - math.log(2)
    return 0.5 * (first.exp() * (first - mean) + second.exp() * (second - mean)).sum(dim=-1)


def _standardized(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of labels `(S,)` against mean and deviation of the log-prob under logits `(S, V)`."""
    logps = logits.log_softmax(dim=-1)
    # A token without probability adds 0 to both moments, not 0 times infinity.
    probs, finite = logps.exp(), logps.masked_fill(logps == -torch.inf, 0.0)
    mean = (probs * finite).sum(dim=-1)
    variance = (probs * (finite - mean.unsqueeze(-1)) ** 2).sum(dim=-1)
    return (logps.gather(1, labels.unsqueeze(1)).squeeze(1) - mean) / variance.clamp(min=1e-6).sqrt()


def join(parts: list[Rows]) -> dict[str, Tensor]:
    """Stack right-padded rows of different widths into one batch `(sum of B, max of T)`."""
    width = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    return {
        key: torch.cat([nn.functional.pad(p[key], (0, width - p[key].shape[1]), value=value) for p in parts])
        for key, value in fill.items()
    }


def scored_targets(rows: Rows) -> tuple[Tensor, Tensor]:
    """The token that each position predicts, and whether it is scored: `(B, T)` both."""
    # Position t predicts the label at t + 1.
    targets = nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    return targets, (targets != IGNORE_INDEX) & (rows["attention_mask"] != 0)


def with_plan(rows: Rows) -> dict[str, Any]:
    """The rows with their `Plan` where they are packed."""
    run = rows["attention_mask"] != 0
    layout = layout_of(rows["input_ids"], run)
    return {**rows, PLAN: _plan(rows, layout.tokens.view(run.shape), run)._replace(layout=layout)}


def _plan(rows: Rows, places: Tensor, run: Tensor) -> Plan:
    """Of rows whose states are at `places`, from the tokens that are run, `(B, T)` both."""
    targets, scored = scored_targets(rows)
    answers = (rows["labels"] != IGNORE_INDEX) & run
    used, predictors = places[scored].unique(return_inverse=True)
    by_label = predictors, targets[scored], scored.nonzero()[:, 0]
    return Plan(used, *by_label, places[answers], answers.nonzero()[:, 0])


def answer_lengths(rows: Rows) -> Tensor:
    """`(B,)` number of scored tokens, float."""
    return scored_targets(rows)[1].sum(dim=-1).float()


class Scorer:
    """Turns rows into `AnswerStates` with one causal language model from transformers; see `Forward`.

    Raises:
        UserError: The model is not causal.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.forward = Forward(model)
        self.head = self.forward.head

    def __call__(self, parts: Mapping[str, Rows], layers: Collection[int] = ()) -> dict[str, AnswerStates]:
        """Scored positions of rows by name, such as forget and retain, from one forward pass.

        `layers` are numbers of layers, from 0, whose states are returned, too.
        """
        joined = join(list(parts.values()))
        self.forward.check(joined)
        way = self.forward.way_of(joined)
        plans: dict[str, Plan] = {}
        if way == "packed":
            plans = {n: (rows if PLAN in rows else with_plan(rows))[PLAN] for n, rows in parts.items()}
        layout = stacked([plan.layout for plan in plans.values() if plan.layout]) if plans else None
        with layer_outputs(self.model, layers) as outputs:
            hidden, places = self.forward(joined, layout)
        by_layer = {n: torch.cat(passes) for n, passes in outputs.items()}
        result, start, offset = {}, 0, 0
        for name, rows in parts.items():
            size = len(rows["input_ids"])
            plan = plans.get(name)
            if plan is None:
                part = {key: value[start : start + size] for key, value in joined.items()}
                # A masked token is run only where rows are padded.
                plan = _plan(part, places[start : start + size], (part["attention_mask"] != 0) | (way == "padded"))
            answers = plan.answers + offset
            result[name] = AnswerStates(
                hidden=hidden.index_select(0, plan.used + offset),
                predictors=plan.predictors,
                labels=plan.labels,
                rows=plan.rows,
                size=size,
                head=self.head,
                layers={n: LayerStates(by_layer[n][answers].float(), plan.answer_rows, size) for n in layers},
            )
            start, offset = start + size, offset + (len(plan.layout.cells) if plan.layout else 0)
        return result

    def all_logits(self, rows: Rows) -> Tensor:
        """`(B, T, V)` float32 logits at every position, padding included.

        Raises:
            UserError: The model runs rows one by one.
        """
        if self.forward.way_of(rows) == "alone":
            raise UserError(
                f"{type(self.model).__name__} runs rows one by one and has no logits of padding; "
                "give an objective and a retain loss that read only answers"
            )
        output = self.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False)
        return output.logits.float()
