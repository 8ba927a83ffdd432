"""Plain text in rows of tokens: blocks, a row a document, what is scored, what is refused."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from simnpo_pl.data import text
from simnpo_pl.data.text import Texts, front_ids, text_blocks
from simnpo_pl.data.tokenization import IGNORE_INDEX, PromptTemplate
from simnpo_pl.data.training import TrainingRows
from simnpo_pl.utils.errors import UserError
from test_tokenization import byte_level

WITH_BOS, WITHOUT = byte_level(), byte_level("$A")


def ids_of(tokenizer, words: str) -> list[int]:
    return tokenizer(words, add_special_tokens=False)["input_ids"]


def test_some_of_the_rows():
    """Rows of questions by their place; of text, documents, before they are joined."""
    pairs = [{"question": q, "answer": q} for q in "abc"]
    assert TrainingRows(pairs, retain=pairs).only([2, 0]) == TrainingRows([pairs[2], pairs[0]], retain=pairs)
    assert TrainingRows(Texts(["x", "y", "z"])).only([1]) == TrainingRows(Texts(["y"]))
    with pytest.raises(UserError, match=r"--data.forget_rows names row 3, but there are 3, counted from 0"):
        TrainingRows(pairs).only([3])


@given(st.text(alphabet="ab é\n", min_size=1, max_size=60), st.integers(2, 9), st.booleans())
def test_blocks_hold_the_text_in_order(words: str, length: int, bos: bool):
    """Every token once; all but a row's first scored; with BOS so is every token of the text."""
    tokenizer = WITH_BOS if bos else WITHOUT
    front = [0] if bos else []
    assert front_ids(tokenizer) == front
    rows = text_blocks(tokenizer, words, length)
    assert all(len(row.input_ids) == length for row in rows[:-1])
    held = [i for row in rows for i in row.input_ids[len(front) :]]
    ids = ids_of(tokenizer, words)
    # A last block of one token has nothing to score.
    assert held == ids or (not bos and [*held, ids[-1]] == ids)
    for row in rows:
        assert row.input_ids[: len(front)] == front
        assert row.labels == [IGNORE_INDEX, *row.input_ids[1:]]
        assert row.length == len(row.input_ids) - 1 > 0
    if bos:
        assert sum(row.length for row in rows) == len(ids)


def encoded(documents: list[str], tokenizer=WITH_BOS, **options) -> list:
    return Texts(documents, "documents").encode(PromptTemplate(tokenizer, **options), "forget")


def test_row_of_each_document():
    rows = encoded(["The author", "born"], max_length=50)
    assert [row.input_ids for row in rows] == [[0, *ids_of(WITH_BOS, t)] for t in ("The author", "born")]
    cut = encoded(["The author was born", "The"], max_length=4, truncate=True)
    assert cut[0].input_ids == [0, *ids_of(WITH_BOS, "The author was born")][:4]
    assert cut[0].length == 3
    assert 1 not in cut[1].input_ids  # no end-of-sequence


def test_documents_are_joined_by_a_blank_line():
    encoder = PromptTemplate(WITH_BOS, max_length=5)
    assert Texts(["The author", "born"]).encode(encoder, "forget") == text_blocks(WITH_BOS, "The author\n\nborn", 5)
    assert len(encoded(["The author", "born"])) == 2


def test_filled_last_block():
    """By hand: ten tokens in rows of BOS and four; the last has two and is completed from the first row's start."""
    encoder = PromptTemplate(WITH_BOS, max_length=5)
    words = "abcdefghij"
    ids = ids_of(WITH_BOS, words)
    assert len(ids) == 10
    rows = Texts([words], last_block="filled").encode(encoder, "forget")
    assert rows[-1].input_ids == [0, *ids[8:], 0, ids[0]]
    assert rows[-1].labels == [IGNORE_INDEX, *ids[8:], 0, ids[0]]
    assert Texts([words]).encode(encoder, "forget")[-1].input_ids == [0, *ids[8:]]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (Texts(["a", " "]), {}, "forget text 1, counted from 0: expected text as text, got ' '"),
        (Texts(["\ud800"]), {}, "forget text 0, counted from 0: .* is not a character"),
        (Texts(["a"]), {"max_length": None}, "name no length: give --data.max_length"),
        (Texts(["a"]), {"max_length": 1}, "need at least 2 tokens, got max_length 1"),
        (Texts([]), {}, "forget: the text is too short"),
        (Texts(["a b c", "a"], "documents"), {"max_length": 3}, "1 of 2 forget texts are longer than max_length = 3"),
    ],
)
def test_refused(texts: Texts, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        texts.encode(PromptTemplate(WITH_BOS, **{"max_length": 8, **options}), "forget")


def test_nothing_to_score_without_bos():
    with pytest.raises(UserError, match="too short to score a token"):
        encoded(["a"], WITHOUT)
    with pytest.raises(UserError, match="the text is too short"):
        Texts(["a"]).encode(PromptTemplate(WITHOUT, max_length=8), "forget")


def test_training_rows_of_text():
    encoder = PromptTemplate(WITH_BOS, max_length=6)
    rows = TrainingRows(Texts(["The author was born"]), Texts(["another city", "of cafés"], "documents"))
    encoded = rows.encode(encoder, ("forget",), 0)
    assert set(encoded) == {"forget"}
    encoded = TrainingRows(rows.forget, Texts(["another city"])).encode(encoder, ("forget", "retain"), 0)
    assert encoded["retain"] == text_blocks(WITH_BOS, "another city", 6)
    with pytest.raises(UserError, match="1 of 1 forget rows are also retain rows"):
        TrainingRows(Texts(["one"]), Texts(["two", " one"])).encode(encoder, ("retain",), 0)
    with pytest.raises(UserError, match="the loss needs retain rows"):
        TrainingRows(Texts(["one"])).encode(encoder, ("retain",), 0)
    with pytest.raises(UserError, match="the forget rows are plain text"):
        TrainingRows(Texts(["one"]), refusals=["no"]).encode(encoder, ("alternate",), 0)


@pytest.mark.parametrize("case", ["forget_txt", "retain1_txt", "short_txt", "forget_txt_no_bos"])
def test_golden_blocks(shared: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    """Ids of all blocks as muse_bench cuts them, its filled last block included."""
    golden = json.loads((shared / "goldens/muse/A/losses.json").read_text())["blocks"][case]
    corpus = shared / "goldens/muse/corpus/raw"
    words = golden["text"] if case == "short_txt" else (corpus / golden["file"]).read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(shared / "goldens/A/target")
    if not golden["add_bos_token"]:
        monkeypatch.setattr(text, "front_ids", lambda tokenizer: [])
    encoder = PromptTemplate(tokenizer, max_length=golden["max_len"])
    filled = [row.input_ids for row in Texts([words], last_block="filled").encode(encoder, "forget")]
    assert (
        hashlib.sha256(json.dumps(filled).encode()).hexdigest()[:16] == golden["sha256_16_of_json_dumps_of_all_blocks"]
    )
    # Ours differs in the last block alone, which ends with the text.
    short = [row.input_ids for row in Texts([words]).encode(encoder, "forget")]
    assert short[:-1] == filled[:-1]
    assert short[-1] == filled[-1][: golden["last_block_filled_from_position"]]


def test_golden_documents(shared: Path):
    """One row a document: cut to 256 tokens as in muse_bench; ours end with the text, theirs are padded."""
    golden = json.loads((shared / "goldens/muse/A/losses.json").read_text())["blocks"]["forget_json"]
    documents = json.loads((shared / "goldens/muse/corpus/raw/forget.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(shared / "goldens/A/target")
    ours = encoded(documents, tokenizer, max_length=golden["max_len"], truncate=True)
    padded = [row.input_ids + [tokenizer.pad_token_id] * (golden["max_len"] - len(row.input_ids)) for row in ours]
    digest = hashlib.sha256(json.dumps(padded).encode()).hexdigest()[:16]
    assert digest == golden["sha256_16_of_json_dumps_of_all_blocks"]
    assert len(ours[0].input_ids) == golden["first_padded_row_tokens"]
    assert sum(len(row.input_ids) < golden["max_len"] for row in ours) == golden["rows_padded"]
