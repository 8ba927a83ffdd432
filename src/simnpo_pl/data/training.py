"""Training batches: rows of questions and answers or of plain text, as tokens, padded.

Each micro-batch brings what a mean over its effective batch needs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from simnpo_pl.data.pairing import MicroBatch, draw_alternate
from simnpo_pl.data.sources import check_disjoint, check_rows
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import IGNORE_INDEX, PromptTemplate, TokenRow
from simnpo_pl.utils.errors import UserError

Part = dict[str, Tensor]
Batch = Mapping[str, Part]
"""Parts `forget`, `retain`, `alternate`, `sampled`, see `TrainingSet`."""
Rows = list[dict[str, Any]] | Texts
"""Rows with `question` and `answer`, or plain text."""


@dataclass(frozen=True)
class TrainingRows:
    """What a benchmark trains on.

    Args:
        forget: What the objective is applied to.
        retain: What the retain loss is applied to; may be empty.
        refusals: Answers that may replace a forget answer; may be empty.
        sampled: The start model's other answers to each forget question; may be empty.
    """

    forget: Rows
    retain: Rows = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    sampled: list[list[str]] = field(default_factory=list)

    def only(self, chosen: Sequence[int]) -> "TrainingRows":
        """The same with some of the forget rows (of text: documents), by their index from 0."""
        items = items_of(self.forget)
        for row in chosen:
            if not 0 <= row < len(items):
                raise UserError(f"--data.forget_rows names row {row}, but there are {len(items)}, counted from 0")
        kept = [items[row] for row in chosen]
        forget = replace(self.forget, documents=kept) if isinstance(self.forget, Texts) else kept
        return replace(self, forget=forget, sampled=[self.sampled[row] for row in chosen] if self.sampled else [])

    def encode(self, encoder: PromptTemplate, parts: Collection[str], seed: int) -> dict[str, list[TokenRow]]:
        """Tokenize the rows of the parts that the losses read, by part; one alternate for each forget row.

        `seed` chooses the refusal of each forget row. Where sampled answers are read, a forget row comes once for each.
        """
        encoded = {"forget": _encode(self.forget, encoder, "forget")}
        if "retain" in parts:
            if not items_of(self.retain):
                raise UserError("the loss needs retain rows, got none: give --data.retain FILE or --data.retain auto")
            encoded["retain"] = _encode(self.retain, encoder, "retain")
            check_disjoint(items_of(self.forget), items_of(self.retain), "retain")
        if "alternate" in parts:
            questions = questions_of(self.forget, "answers questions with refusals")
            if not self.refusals:
                raise UserError("this objective needs refusals, got none: give --data.refusals FILE, one a line")
            drawn = [draw_alternate(len(self.refusals), seed, row) for row in range(len(questions))]
            pairs = [(row["question"], self.refusals[d]) for row, d in zip(questions, drawn, strict=True)]
            encoded["alternate"] = encoder.encode_rows(pairs, "alternate")
        if "sampled" in parts:
            questions = questions_of(self.forget, "reads other answers to questions")
            if not self.sampled:
                raise UserError(
                    "this objective needs other answers to the forget questions, got none: `fit` asks the start model "
                    "for them, or give --data.alternates FILE"
                )
            rows = [row for row, texts in enumerate(self.sampled) for _ in texts]
            pairs = [(questions[row]["question"], text) for row, texts in enumerate(self.sampled) for text in texts]
            encoded["sampled"] = encoder.encode_rows(pairs, "alternates")
            encoded["forget"] = [encoded["forget"][row] for row in rows]
        return encoded


def _encode(rows: Rows, encoder: PromptTemplate, name: str) -> list[TokenRow]:
    if isinstance(rows, Texts):
        return rows.encode(encoder, name)
    check_rows(rows, name)
    return encoder.encode_rows([(row["question"], row["answer"]) for row in rows], name)


def items_of(rows: Rows) -> Sequence[Any]:
    """The rows themselves, of plain text its documents."""
    return rows.documents if isinstance(rows, Texts) else rows


def questions_of(rows: Rows, use: str) -> list[dict[str, Any]]:
    """The forget rows of an objective that needs questions, for the use that it makes of them."""
    if isinstance(rows, Texts):
        raise UserError(f"this objective {use}, but the forget rows are plain text")
    return rows


def collate(rows: Sequence[TokenRow]) -> Part:
    """Pad B rows, at least one, on the right to the longest of them, T tokens.

    Returns:
        Three int64 tensors `(B, T)`: `input_ids`; `labels`, IGNORE_INDEX where not scored; and `attention_mask`, 1 on a
        row's own tokens and 0 on padding, whose id 0 may also be that of a real token.
    """

    def padded(values: Iterable[Sequence[int]], fill: int = 0) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=fill)

    return {
        "input_ids": padded(row.input_ids for row in rows),
        "labels": padded((row.labels for row in rows), IGNORE_INDEX),
        "attention_mask": padded([1] * len(row.input_ids) for row in rows),
    }


class TrainingSet(Dataset[dict[str, Part]]):
    """Makes the batch of a `MicroBatch`, of all parts that the losses read.

    A part holds `input_ids`, `labels`, `attention_mask` `(B, T)`, and of its rows the `index` and `end` (of a
    `TokenRow`) `(B,)`; and, so that a mean over the effective batch does not depend on how it is cut: `weight` `(B,)`,
    0 for a filler row and else 1, and `step_rows` and `step_tokens`, the rows and scored tokens of the whole effective
    batch, scalars. Sums weighted by these add up over micro-batches and processes to the mean.
    """

    def __init__(self, rows: Mapping[str, Sequence[TokenRow]]) -> None:
        self.rows = rows

    def __getitem__(self, micro: MicroBatch) -> dict[str, Part]:
        parts = {}
        for name, rows in self.rows.items():
            indices, step = (micro.forget, micro.step_forget)
            if name == "retain":
                indices, step = (micro.retain, micro.step_retain)
            parts[name] = {
                **collate([rows[i] for i in indices]),
                "index": torch.tensor(indices),
                "end": torch.tensor([rows[i].end for i in indices]),
                "weight": torch.tensor(micro.real, dtype=torch.float32),
                # Integers, since half precision would round floats of a batch.
                "step_rows": torch.tensor(len(step)),
                "step_tokens": torch.tensor(sum(rows[i].length for i in step)),
            }
        return parts


def effective_mean(per_row: Tensor, part: Part, lengths: Tensor | None = None, skipped: int = 0) -> Tensor:
    """What a part adds to the mean of per-row losses over its effective batch.

    Args:
        per_row: Loss of each row, `(B,)`.
        part: As `TrainingSet` makes it; without `weight`, `step_rows` and `step_tokens` it is an effective batch.
        lengths: Scored tokens of each row, `(B,)`, for a mean over tokens; None means over rows.
        skipped: Scored tokens of each row that the loss leaves out.
    """
    weights = part.get("weight", torch.ones_like(per_row))
    count = part.get("step_rows", weights.sum())
    if lengths is None:
        return (per_row * weights).sum() / count
    tokens = part.get("step_tokens", lengths.sum())
    return (per_row * weights * (lengths - skipped)).sum() / (tokens - skipped * count).clamp(min=1)


def by_length(rows: Sequence[TokenRow], tokens: int) -> Iterator[list[int]]:
    """The numbers of all rows, longest first, in batches of at most `tokens` tokens with their padding."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    while order:
        take = max(1, tokens // len(rows[order[0]].input_ids))
        yield order[:take]
        order = order[take:]


def scoring_parts(rows: Sequence[TokenRow], name: str, tokens: int = 4096) -> Iterator[dict[str, Part]]:
    """All rows once, see `by_length`, with their `index` `(B,)`."""
    for chosen in by_length(rows, tokens):
        yield {name: {**collate([rows[i] for i in chosen]), "index": torch.tensor(chosen)}}
