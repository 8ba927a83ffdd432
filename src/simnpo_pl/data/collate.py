"""Stacks token rows of different lengths into one batch, padded on the right.

The mask comes from the lengths: many models pad with the end-of-sequence id, which is also a real token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simnpo_pl.data.tokenization import IGNORE_INDEX, TokenRow


def collate(rows: Sequence[TokenRow], pad_id: int) -> dict[str, Tensor]:
    """Pads rows on the right to the longest of them.

    Args:
        rows: B rows, at least one.
        pad_id: Token id of the padding; it may also occur as a real token.

    Returns:
        Three int64 tensors of shape (B, T), T the longest row: `input_ids`; `labels`, IGNORE_INDEX where not
        scored; and `attention_mask`, 1 on a row's own tokens and 0 on padding.

    Raises:
        ValueError: There is no row.
    """
    if not rows:
        raise ValueError("expected at least one row to collate, got none")
    shape = len(rows), max(len(row.input_ids) for row in rows)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.tensor(row.input_ids, dtype=torch.long)
        labels[index, :length] = torch.tensor(row.labels, dtype=torch.long)
        attention_mask[index, :length] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
