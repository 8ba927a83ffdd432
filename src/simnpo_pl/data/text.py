"""Plain text as token rows: cut into blocks, or one row per document. Every token of a row but its first is scored.

The first is the tokenizer's beginning-of-sequence token where it puts one in front of text. No end-of-sequence token
is added, since text continues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from simnpo_pl.data.sources import text_of
from simnpo_pl.data.tokenization import IGNORE_INDEX, PromptTemplate, TokenRow, check_unicode, limit_rows
from simnpo_pl.utils.errors import UserError


@dataclass(frozen=True)
class Texts:
    """Plain text to train on.

    Args:
        documents: The texts.
        rows: `blocks` joins the documents by a blank line and cuts the result into rows of the maximum length;
            `documents` makes one row of each document.
        last_block: `short` leaves the last block shorter than the others; `filled` fills it from the start of the
            first block, that block's own first token included, as muse_bench does.
    """

    documents: Sequence[str]
    rows: Literal["blocks", "documents"] = "blocks"
    last_block: Literal["short", "filled"] = "short"

    def encode(self, encoder: PromptTemplate, name: str) -> list[TokenRow]:
        """Token rows, with the encoder's tokenizer and maximum length; `name` is what messages call the rows."""
        for index, document in enumerate(self.documents):
            where = f"{name} text {index}, counted from 0"
            check_unicode(text_of({"text": document}, "text", where), where)
        if self.rows == "documents":
            rows = [_scored(ids) for ids in text_ids(encoder.tokenizer, self.documents)]
            for index, row in enumerate(rows):
                if row.length < 1:
                    raise UserError(f"{name} text {index}, counted from 0: too short to score a token of it; remove it")
            return limit_rows(rows, encoder.max_length, encoder.truncate, f"{name} texts")
        if encoder.max_length is None:
            raise UserError("text is cut in blocks, but tokenizer and model name no length: give --data.max_length")
        blocks = text_blocks(encoder.tokenizer, "\n\n".join(self.documents), encoder.max_length)
        if not blocks:
            raise UserError(f"{name}: the text is too short to score a token of it; give more text")
        if self.last_block == "filled":
            blocks[-1] = _scored((blocks[-1].input_ids + blocks[0].input_ids)[: encoder.max_length])
        return blocks


def text_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[TokenRow]:
    """One text, tokenized as a whole and cut into rows of `length` tokens, at least 2, the last one shorter."""
    if length < 2:
        raise UserError(f"blocks of text need at least 2 tokens, got max_length {length}: raise it")
    front = front_ids(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - len(front)
    rows = [_scored(front + ids[start : start + step]) for start in range(0, len(ids), step)]
    # Without a token in front, a last block of one token has nothing to score.
    return [row for row in rows if row.length]


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, with the beginning-of-sequence id where the tokenizer puts one in front."""
    front = front_ids(tokenizer)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [front + ids for ids in encoded]


def front_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence id where the tokenizer puts one in front of text, else nothing."""
    first = tokenizer("a")["input_ids"][0]
    return [first] if first == tokenizer.bos_token_id else []


def _scored(ids: list[int]) -> TokenRow:
    return TokenRow(ids, [IGNORE_INDEX, *ids[1:]])
