"""Training rows as batches: each micro-batch says how large the effective batch it is part of."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from simnpo_pl.data.collate import collate
from simnpo_pl.data.pairing import MicroBatch
from simnpo_pl.data.tokenization import TokenRow

Part = dict[str, Tensor]


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


def scoring_parts(rows: Sequence[TokenRow], name: str, pad_id: int, tokens: int = 4096) -> Iterator[dict[str, Part]]:
    """All rows once, longest first, in batches of at most `tokens` tokens, with their `index` `(B,)`."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    while order:
        take = max(1, tokens // len(rows[order[0]].input_ids))
        chosen, order = order[:take], order[take:]
        yield {name: {**collate([rows[i] for i in chosen], pad_id), "index": torch.tensor(chosen)}}
