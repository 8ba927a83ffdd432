"""Plain text in tokens: cut into blocks, or a row each. Every token of a row but its first is scored.

The first is the tokenizer's beginning-of-sequence token where it puts one in front of text. No end-of-sequence is
added, since text goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from simnpo_pl.data.tokenization import IGNORE_INDEX, PromptTemplate, TokenRow, check_unicode
from simnpo_pl.utils.errors import UserError

SEPARATOR = "\n\n"
"""Between documents that are joined."""


@dataclass(frozen=True)
class Texts:
    """Plain text to train on.

    Args:
        documents: The texts.
        rows: `blocks` joins the documents by a blank line and cuts the whole into rows of the longest length;
            `documents` makes a row of each document.
        last_block: What becomes of the last block, which is shorter: `short` leaves it so; `filled` completes it
            from the start of the first block, that block's own first token included, as muse_bench does.
    """

    documents: Sequence[str]
    rows: Literal["blocks", "documents"] = "blocks"
    last_block: Literal["short", "filled"] = "short"

    def encode(self, encoder: PromptTemplate, name: str) -> list[TokenRow]:
        """Rows of tokens.

        Args:
            encoder: Brings the tokenizer, the longest length and whether longer documents are cut.
            name: What the rows are called in messages, such as "forget".

        Raises:
            UserError: There is no text, a document is longer than a row may be, or blocks have no length.
        """
        for index, document in enumerate(self.documents):
            where = f"{name} text {index}, counted from 0"
            if not isinstance(document, str) or not document.strip():
                raise UserError(f"{where}: expected text, got {document!r}; mend or remove it")
            check_unicode(document, where)
        if self.rows == "documents":
            return text_rows(encoder.tokenizer, self.documents, encoder.max_length, encoder.truncate, name)
        if encoder.max_length is None:
            raise UserError("text is cut in blocks, but tokenizer and model name no length: give --data.max_length")
        blocks = text_blocks(encoder.tokenizer, SEPARATOR.join(self.documents), encoder.max_length)
        if self.last_block == "filled" and blocks:
            blocks[-1] = _scored((blocks[-1].input_ids + blocks[0].input_ids)[: encoder.max_length])
        if not blocks:
            raise UserError(f"{name}: the text is too short to score a token of it; give more text")
        return blocks


def text_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> list[TokenRow]:
    """One text cut into rows of `length` tokens, the last one shorter.

    Args:
        tokenizer: Tokenises the whole text at once.
        text: Any length.
        length: Tokens of a row, at least 2, with the one put in front of every row.

    Raises:
        UserError: `length` is below 2.
    """
    if length < 2:
        raise UserError(f"blocks of text need at least 2 tokens, got max_length {length}: raise it")
    front = front_ids(tokenizer)
    ids = _ids(tokenizer, [text])[0]
    step = length - len(front)
    rows = [_scored(front + ids[start : start + step]) for start in range(0, len(ids), step)]
    # Without a token in front, a last block of one token has nothing to score.
    return [row for row in rows if row.length]


def text_rows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    max_length: int | None = None,
    truncate: bool = False,
    name: str = "given",
) -> list[TokenRow]:
    """One row a document.

    Args:
        tokenizer: Tokenises each document by itself.
        documents: The texts.
        max_length: Most tokens of a row, the one in front included; None sets no limit.
        truncate: Whether longer documents are cut at their end instead of being refused.
        name: What the rows are called in messages.

    Raises:
        UserError: A document is too long, or too short to score a token of it.
    """
    rows = text_ids(tokenizer, documents)
    longest = max(map(len, rows), default=0)
    if max_length is not None and longest > max_length and not truncate:
        count = sum(len(ids) > max_length for ids in rows)
        raise UserError(
            f"{count} of {len(rows)} {name} texts are longer than max_length = {max_length} tokens, the longest has "
            f"{longest}: raise --data.max_length, or cut them with --data.truncate true"
        )
    for index, ids in enumerate(rows):
        if len(ids) < 2:
            raise UserError(f"{name} text {index}, counted from 0: too short to score a token of it; remove it")
    return [_scored(ids[:max_length]) for ids in rows]


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, with the beginning-of-sequence id where the tokenizer puts one in front."""
    front = front_ids(tokenizer)
    return [front + ids for ids in _ids(tokenizer, texts)]


def front_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence id where the tokenizer puts one in front of text, else nothing."""
    first = tokenizer("a")["input_ids"][0]
    return [first] if first == tokenizer.bos_token_id else []


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _scored(ids: list[int]) -> TokenRow:
    return TokenRow(ids, [IGNORE_INDEX, *ids[1:]])
