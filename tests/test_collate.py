import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simnpo_pl.data.tokenization import IGNORE_INDEX, TokenRow
from simnpo_pl.data.training import collate


@st.composite
def token_rows(draw: st.DrawFn) -> TokenRow:
    ids = draw(st.lists(st.integers(0, 3), min_size=1, max_size=9))
    scored_from = draw(st.integers(0, len(ids)))
    return TokenRow(ids, [IGNORE_INDEX] * scored_from + ids[scored_from:])


@given(rows=st.lists(token_rows(), min_size=1, max_size=5), pad_id=st.integers(0, 3))
def test_rows_come_back_through_the_mask(rows: list[TokenRow], pad_id: int) -> None:
    batch = collate(rows, pad_id)
    longest = max(len(row.input_ids) for row in rows)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (torch.int64, (len(rows), longest))
    )
    mask = batch["attention_mask"].bool()
    for index, row in enumerate(rows):
        assert batch["input_ids"][index, mask[index]].tolist() == row.input_ids
        assert batch["labels"][index, mask[index]].tolist() == row.labels
    assert (batch["input_ids"][~mask] == pad_id).all()
    assert (batch["labels"][~mask] == IGNORE_INDEX).all()


def test_real_tokens_equal_to_the_padding_stay_visible() -> None:
    batch = collate([TokenRow([5, 1], [-100, 1]), TokenRow([5, 6, 1], [-100, 6, 1])], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 1, 1], [5, 6, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 1, -100], [-100, 6, 1]]


def test_nothing_to_collate_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least one row to collate, got none"):
        collate([], 0)
