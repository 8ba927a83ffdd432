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


@given(rows=st.lists(token_rows(), min_size=1, max_size=5))
def test_rows_come_back_through_the_mask(rows: list[TokenRow]) -> None:
    batch = collate(rows)
    longest = max(len(row.input_ids) for row in rows)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (torch.int64, (len(rows), longest))
    )
    mask = batch["attention_mask"].bool()
    for index, row in enumerate(rows):
        assert batch["input_ids"][index, mask[index]].tolist() == row.input_ids
        assert batch["labels"][index, mask[index]].tolist() == row.labels
    assert (batch["input_ids"][~mask] == 0).all()
    assert (batch["labels"][~mask] == IGNORE_INDEX).all()


def test_real_tokens_equal_to_the_padding_stay_visible() -> None:
    batch = collate([TokenRow([5, 0], [-100, 0]), TokenRow([5, 6, 0], [-100, 6, 0])])
    assert batch["input_ids"].tolist() == [[5, 0, 0], [5, 6, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 0, -100], [-100, 6, 0]]
