"""What is trained on: rows of questions and answers or of plain text, in tokens, in batches.

Each micro-batch says how large the effective batch is that it is part of.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simnpo_pl.data.collate import collate
from simnpo_pl.data.pairing import MicroBatch, PairedSampler, draw_alternate
from simnpo_pl.data.sources import check_disjoint, check_rows
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import PromptTemplate, TokenRow
from simnpo_pl.utils.errors import UserError

Part = dict[str, Tensor]
Rows = list[dict[str, Any]] | Texts
"""Rows with `question` and `answer`, or plain text."""


@dataclass(frozen=True)
class TrainingRows:
    """What a benchmark trains on.

    Args:
        forget: What the objective is applied to.
        retain: What the retain loss is applied to; may be empty.
        refusals: Answers that may stand in for a forget answer; may be empty.
    """

    forget: Rows
    retain: Rows = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def only(self, chosen: Sequence[int]) -> "TrainingRows":
        """Some of the forget rows (of text: documents), by their place from 0; everything else as it is.

        Raises:
            UserError: There is no such row.
        """
        items = _items(self.forget)
        for row in chosen:
            if not 0 <= row < len(items):
                raise UserError(f"--data.forget_rows names row {row}, but there are {len(items)}, counted from 0")
        kept = [items[row] for row in chosen]
        return replace(self, forget=replace(self.forget, documents=kept) if isinstance(self.forget, Texts) else kept)

    def form(self, encoder: PromptTemplate) -> str:
        """How the forget rows become tokens, in a few words."""
        if isinstance(self.forget, Texts):
            return f"text, {self.forget.rows} of at most {encoder.max_length} tokens"
        return f"prompt: {encoder.description}"

    def encode(self, encoder: PromptTemplate, parts: Collection[str], seed: int) -> dict[str, list[TokenRow]]:
        """Rows in tokens.

        Args:
            encoder: Tokenises questions and answers, and brings the tokenizer for text.
            parts: What the losses need: `forget`, `retain`, `alternate`.
            seed: Chooses the refusal of each forget row.

        Returns:
            Part to its rows; alternates are one for each forget row.

        Raises:
            UserError: Rows are missing or unusable.
        """
        encoded = {"forget": _encode(self.forget, encoder, "forget")}
        if "retain" in parts:
            if not _items(self.retain):
                raise UserError("the retain loss needs retain rows, got none: name them or set --model.retain_weight 0")
            encoded["retain"] = _encode(self.retain, encoder, "retain")
            check_disjoint(_items(self.forget), _items(self.retain), "retain")
        if "alternate" in parts:
            encoded["alternate"] = encoder.encode_rows(self._alternates(seed), "alternate")
        return encoded

    def _alternates(self, seed: int) -> list[tuple[str, str]]:
        """Every forget question with a refusal."""
        if isinstance(self.forget, Texts):
            raise UserError("this objective answers questions with refusals, but the forget rows are plain text")
        if not self.refusals:
            raise UserError("this objective needs refusals, got none: give --data.refusals FILE, one a line")
        drawn = [draw_alternate(len(self.refusals), seed, row) for row in range(len(self.forget))]
        return [(row["question"], self.refusals[d]) for row, d in zip(self.forget, drawn, strict=True)]


def _encode(rows: Rows, encoder: PromptTemplate, name: str) -> list[TokenRow]:
    if isinstance(rows, Texts):
        return rows.encode(encoder, name)
    check_rows(rows, name)
    return encoder.encode_rows([(row["question"], row["answer"]) for row in rows], name)


def _items(rows: Rows) -> Sequence[Any]:
    return rows.documents if isinstance(rows, Texts) else rows


class TrainingSet(Dataset[dict[str, Part]]):
    """Makes the batch of a `MicroBatch`.

    A part holds `input_ids`, `labels`, `attention_mask` `(B, T)` and `index` `(B,)`; and, so that a mean over the
    effective batch does not depend on how it is cut: `weight` `(B,)`, 0 for a filler row and else 1, and
    `step_rows` and `step_tokens`, the rows and scored tokens of the whole effective batch, scalars. Sums weighted by
    these add up over micro-batches and processes to the mean.

    Args:
        rows: `forget` rows, and `retain` and `alternate` rows where the losses need them; alternates are one
            for each forget row.
        pad_id: Token id that fills rows up.
    """

    def __init__(self, rows: Mapping[str, Sequence[TokenRow]], pad_id: int) -> None:
        self.rows = rows
        self.pad_id = pad_id

    def __getitem__(self, micro: MicroBatch) -> dict[str, Part]:
        taken = {"forget": (micro.forget, micro.step_forget), "alternate": (micro.forget, micro.step_forget)}
        taken["retain"] = (micro.retain, micro.step_retain)
        return {name: self._part(name, *taken[name], micro.real) for name in self.rows}

    def _part(self, name: str, indices: Sequence[int], step: Sequence[int], real: Sequence[bool]) -> Part:
        rows = self.rows[name]
        return {
            **collate([rows[i] for i in indices], self.pad_id),
            "index": torch.tensor(indices),
            "weight": torch.tensor(real, dtype=torch.float32),
            # Whole numbers, since half precision would round floats of a batch.
            "step_rows": torch.tensor(len(step)),
            "step_tokens": torch.tensor(sum(rows[i].length for i in step)),
        }


class TrainingLoader(DataLoader[dict[str, Part]]):
    """Loader of a `TrainingSet`; having a state, it counts as one that can go on in the middle of an epoch.

    Args:
        rows: The training set.
        sampler: Chooses the micro-batches.
    """

    def __init__(self, rows: TrainingSet, sampler: PairedSampler) -> None:
        super().__init__(rows, batch_size=None, sampler=sampler)
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict


def scoring_parts(rows: Sequence[TokenRow], name: str, pad_id: int, tokens: int = 4096) -> Iterator[dict[str, Part]]:
    """All rows once, longest first, in batches of at most `tokens` tokens, with their `index` `(B,)`."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    while order:
        take = max(1, tokens // len(rows[order[0]].input_ids))
        chosen, order = order[:take], order[take:]
        yield {name: {**collate([rows[i] for i in chosen], pad_id), "index": torch.tensor(chosen)}}
