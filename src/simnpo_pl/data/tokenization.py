"""Turns a question and its answer into token ids, with labels on the answer.

Prompt and answer are tokenised together, because tokens may straddle the seam between the two; character
offsets then say which tokens hold the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from simnpo_pl.data.conversation import AnswerEnd, ChatTemplate, Conversation, Placed, parse_date
from simnpo_pl.utils.errors import UserError

IGNORE_INDEX = -100
"""Label of a token that is not scored."""

PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
"""Used when neither the user nor the tokenizer brings a template."""

CHAT_DATE_STRING = "26 Jul 2024"
"""The day chat templates are told by default: some print today's, and results would change from day to day."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One prompt with its answer, as token ids.

    Attributes:
        input_ids: Ids of the whole sequence, T of them.
        labels: For each of the T positions the id itself where it is scored, else IGNORE_INDEX. The labels
            are not shifted: a scored id is predicted from the ids before it.
        end: Number of scored ids that end the answer, the last ones; 0 where it was cut, and for plain text.
    """

    input_ids: list[int]
    labels: list[int]
    end: int = 0

    @property
    def length(self) -> int:
        """Number of scored tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the first scored one, from which a generated answer starts."""
        scored = (index for index, label in enumerate(self.labels) if label != IGNORE_INDEX)
        return self.input_ids[: next(scored, len(self.input_ids))]


class PromptTemplate:
    """Encodes question-answer pairs with one tokenizer and one form of prompt.

    Args:
        tokenizer: A fast tokenizer (one that reports character offsets) with an end-of-sequence token.
        template: Text with `{question}` and, at its end, `{answer}`, each once; other braces are literal.
            None takes the tokenizer's chat template, or PLAIN_TEMPLATE when it has none.
        max_length: Most tokens a sequence may have, the end of the answer included; None sets no limit.
        truncate: Cut the answers of longer sequences at the end instead of refusing the data.
        system_prompt: See `ChatTemplate`, as the following.
        date: Day such as "26 Jul 2024".
        answer_end: What ends an answer; without a chat template always the end-of-sequence token.
        chat_template_kwargs: Variables of the chat template.

    Raises:
        UserError: The tokenizer, the template or an option does not qualify, or `max_length` is below 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_length: int | None = None,
        truncate: bool = False,
        system_prompt: str | None = None,
        date: str = CHAT_DATE_STRING,
        answer_end: AnswerEnd = "turn",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        kind = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"expected a fast tokenizer, got {kind} without offsets: use one with tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer ({kind}) has no end-of-sequence token: set its eos_token")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length must be at least 1 token, got {max_length}: raise it or leave it out")
        parse_date(date)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate = truncate
        self.chat: ChatTemplate | None = None
        if template is None and tokenizer.chat_template is not None:
            self.chat = ChatTemplate(tokenizer, date, system_prompt, chat_template_kwargs, answer_end)
        elif chat_template_kwargs:
            raise UserError("--data.chat_template_kwargs: no chat template is used here; leave it out")
        self._template = PLAIN_TEMPLATE if template is None else template
        self._before, self._between = _split_template(self._template)
        self.end_ids = {int(tokenizer.eos_token_id)}

    @property
    def description(self) -> str:
        """The form of the prompt in a few words, for logs."""
        return f"template {self._template!r}" if self.chat is None else self.chat.description

    def finish(self, generated: str) -> str:
        """A generated answer without what follows a turn's end of ordinary text, at which no generation stops."""
        ordinary = self.chat is not None and self.chat.end_id is None and self.chat.end
        return (generated.split(ordinary)[0] if ordinary else generated).strip()

    def encode(self, question: str, answer: str) -> TokenRow:
        """Encodes one pair; see `encode_rows`."""
        return self.encode_rows([(question, answer)], "given")[0]

    def encode_rows(self, pairs: Sequence[tuple[str, str]], name: str) -> list[TokenRow]:
        """Encodes pairs: scored are every token that holds a character of the answer and those that end it.

        Args:
            pairs: Questions, or conversations, with their answers.
            name: What the rows are called in messages, such as "forget".

        Returns:
            One row per pair, in order. A truncated row has no end.

        Raises:
            UserError: An answer yields no token or holds one that ends answers, a prompt is empty, the chat template
                refuses a row, or a sequence is longer than `max_length` (with `truncate`: its prompt alone fills it).
        """
        if not pairs:
            return []
        wheres = [f"{name} row {i}, counted from 0 (question {q[:80]!r})" for i, (q, _) in enumerate(pairs)]
        placed = [self._place(*pair, where) for pair, where in zip(pairs, wheres, strict=True)]
        for (text, _, _), where in zip(placed, wheres, strict=True):
            check_unicode(text, where)
        if self.chat is not None and self.chat.end_id is not None:
            self.end_ids.add(self.chat.end_id)
        encoded = self.tokenizer(
            [text for text, _, _ in placed],
            # The text of a chat template carries its own special tokens.
            add_special_tokens=self.chat is None,
            return_offsets_mapping=True,
            padding=False,
            truncation=False,
            verbose=False,
        )
        parts = zip(encoded["input_ids"], encoded["offset_mapping"], placed, wheres, strict=True)
        return self._limit([self._label(*part) for part in parts], name)

    def _place(self, question: str, answer: str, where: str) -> Placed:
        if self.chat is not None:
            return self.chat.place(question, answer, where)
        if isinstance(question, Conversation):
            raise UserError(
                f"{where}: a conversation needs a chat template; leave out --data.template, or give a tokenizer "
                "that has one"
            )
        prompt = self._before + question + self._between
        return Placed(prompt + answer, len(prompt), len(prompt + answer))

    def _label(self, ids: list[int], offsets: Sequence[tuple[int, int]], placed: Placed, where: str) -> TokenRow:
        """Cuts off what follows the answer, adds the end-of-sequence unless the text has an end, marks what is scored.

        A token holds part of the answer exactly when it ends after the answer starts. Its own start says
        less: some tokenizers trim leading spaces from offsets, down to an empty span. Special tokens added
        around the text have the span (0, 0).
        """
        held = [index for index, (_, end) in enumerate(offsets) if end > placed.start]
        end = sum(offsets[index][0] >= placed.stop and offsets[index][1] > placed.stop for index in held)
        if len(held) == end:
            raise UserError(f"{where}: the tokenizer makes no token of the answer; mend or remove the row")
        first, last = held[0], held[-1]
        if found := self.end_ids.intersection(ids[first : last + 1 - end]):
            token = self.tokenizer.convert_ids_to_tokens(min(found))
            raise UserError(
                f"{where}: the answer holds the end-of-sequence token {token!r}, which is "
                "added by itself; remove it from the text"
            )
        ids = ids[: last + 1]
        if placed.stop == len(placed.text):
            ids, end = [*ids, self.tokenizer.eos_token_id], 1
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            # The template spells out the token that the tokenizer adds as well.
            ids, first = ids[1:], first - 1
        if first == 0:
            raise UserError(
                f"{where}: no token stands before the answer, so its first token cannot be scored; "
                "put text before {answer} in the template"
            )
        return TokenRow(ids, [IGNORE_INDEX] * first + ids[first:], end)

    def _limit(self, rows: list[TokenRow], name: str) -> list[TokenRow]:
        """Refuses or cuts rows longer than the limit."""
        limit = self.max_length
        if limit is None:
            return rows
        lengths = [len(row.input_ids) for row in rows]
        count = sum(length > limit for length in lengths)
        if count and not self.truncate:
            raise UserError(
                f"{count} of {len(rows)} {name} rows are longer than max_length = {limit} tokens, the "
                f"longest has {max(lengths)}: raise max_length, or cut answers with --data.truncate true"
            )
        for index, row in enumerate(rows):
            if len(row.prompt_ids) >= limit:
                raise UserError(
                    f"{name} row {index}, counted from 0: the prompt alone has {len(row.prompt_ids)} tokens, "
                    f"which leaves no room within max_length = {limit}: raise it or remove the row"
                )
        lefts = [max(row.end - max(len(row.input_ids) - limit, 0), 0) for row in rows]
        return [TokenRow(r.input_ids[:limit], r.labels[:limit], end) for r, end in zip(rows, lefts, strict=True)]


def _split_template(template: str) -> tuple[str, str]:
    """The text before the question, and that between question and answer."""
    if template.count("{question}") != 1 or template.count("{answer}") != 1 or not template.endswith("{answer}"):
        raise UserError(
            "template: expected {question} and {answer} once each, with {answer} at the very end, "
            f"got {template!r}; an example is {PLAIN_TEMPLATE!r}"
        )
    before, _, between = template.removesuffix("{answer}").partition("{question}")
    return before, between


def check_unicode(text: str, where: str) -> None:
    """Refuses halves of surrogate pairs, which JSON escapes can smuggle in and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {text[error.start]!r} is not a character; mend or remove the row") from error
