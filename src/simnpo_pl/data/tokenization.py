"""Turns a question and its answer into token ids, with labels on the answer.

Prompt and answer are tokenised together, because tokens may straddle the seam between the two; character
offsets then say which tokens hold the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from transformers import PreTrainedTokenizerBase

from simnpo_pl.data.conversation import Conversation
from simnpo_pl.errors import UserError

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
    """

    input_ids: list[int]
    labels: list[int]

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
            None takes the tokenizer's chat template, told the day `date`, or PLAIN_TEMPLATE when it has none.
        max_length: Most tokens a sequence may have, end-of-sequence included; None sets no limit.
        truncate: Cut the answers of longer sequences at the end instead of refusing the data.
        system_prompt: System message, where the chat template is used and a conversation has none of its own; None
            leaves it to that template.
        date: Day told to the chat template, such as "26 Jul 2024".

    Raises:
        UserError: The tokenizer, the template or the date does not qualify, or `max_length` is below 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        max_length: int | None = None,
        truncate: bool = False,
        system_prompt: str | None = None,
        date: str = CHAT_DATE_STRING,
    ) -> None:
        kind = type(tokenizer).__name__
        if not tokenizer.is_fast:
            raise UserError(f"expected a fast tokenizer, got {kind} without offsets: use one with tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer ({kind}) has no end-of-sequence token: set its eos_token")
        if max_length is not None and max_length < 1:
            raise UserError(f"max_length must be at least 1 token, got {max_length}: raise it or leave it out")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate = truncate
        self.system_prompt = system_prompt
        self.date = date
        self._chat_template: str | None = None
        day = _parse_date(date)
        if template is None and tokenizer.chat_template is not None:
            # Templates may call this function even when given a date.
            self._chat_template = re.sub(
                r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
                lambda match: repr(day.strftime(match[2])),
                tokenizer.get_chat_template(),
            )
        self._template = PLAIN_TEMPLATE if template is None else template
        self._before, self._between = _split_template(self._template)

    @property
    def description(self) -> str:
        """The form of the prompt in a few words, for logs."""
        if self._chat_template is not None:
            system = "" if self.system_prompt is None else f", system prompt {self.system_prompt!r}"
            return f"the tokenizer's chat template, dated {self.date}{system}"
        return f"template {self._template!r}"

    def encode(self, question: str, answer: str) -> TokenRow:
        """Encodes one pair; see `encode_rows`."""
        return self.encode_rows([(question, answer)], "given")[0]

    def encode_rows(self, pairs: Sequence[tuple[str, str]], name: str) -> list[TokenRow]:
        """Encodes pairs: scored are every token that holds a character of the answer and one end-of-sequence.

        Args:
            pairs: Questions, or conversations, with their answers.
            name: What the rows are called in messages, such as "forget".

        Returns:
            One row per pair, in order. A truncated row has no end-of-sequence.

        Raises:
            UserError: An answer yields no token or holds the end-of-sequence token, a prompt is empty, or a
                sequence is longer than `max_length` (with `truncate`: its prompt alone fills that length).
        """
        if not pairs:
            return []
        wheres = [f"{name} row {i}, counted from 0 (question {q[:80]!r})" for i, (q, _) in enumerate(pairs)]
        prompts = [self._prompt(question, where) for (question, _), where in zip(pairs, wheres, strict=True)]
        texts = [prompt + answer for prompt, (_, answer) in zip(prompts, pairs, strict=True)]
        for text, where in zip(texts, wheres, strict=True):
            check_unicode(text, where)
        encoded = self.tokenizer(
            texts,
            # The text of a chat template carries its own special tokens.
            add_special_tokens=self._chat_template is None,
            return_offsets_mapping=True,
            padding=False,
            truncation=False,
            verbose=False,
        )
        parts = zip(encoded["input_ids"], encoded["offset_mapping"], map(len, prompts), wheres, strict=True)
        return self._limit([self._label(*part) for part in parts], name)

    def _prompt(self, question: str, where: str) -> str:
        """All text before the answer."""
        several = isinstance(question, Conversation)
        if self._chat_template is None:
            if several:
                raise UserError(
                    f"{where}: a conversation needs a chat template; leave out --data.template, or give a tokenizer "
                    "that has one"
                )
            return self._before + question + self._between
        messages = question.messages if isinstance(question, Conversation) else (("user", question),)
        if self.system_prompt is not None and messages[0][0] != "system":
            messages = (("system", self.system_prompt), *messages)
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                tokenize=False,
                date_string=self.date,
            )
        except TemplateError as error:
            raise UserError(f"{where}: the chat template refuses these messages ({error}); mend the row") from error
        assert isinstance(text, str)
        return text

    def _label(self, ids: list[int], offsets: Sequence[tuple[int, int]], answer_start: int, where: str) -> TokenRow:
        """Cuts off what follows the answer, adds the end-of-sequence and marks what is scored.

        A token holds part of the answer exactly when it ends after the answer starts. Its own start says
        less: some tokenizers trim leading spaces from offsets, down to an empty span. Special tokens added
        around the text have the span (0, 0).
        """
        held = [index for index, (_, end) in enumerate(offsets) if end > answer_start]
        if not held:
            raise UserError(f"{where}: the tokenizer makes no token of the answer; mend or remove the row")
        first, last = held[0], held[-1]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos in ids[first : last + 1]:
            raise UserError(
                f"{where}: the answer holds the end-of-sequence token {self.tokenizer.eos_token!r}, which is "
                "added by itself; remove it from the text"
            )
        ids = [*ids[: last + 1], eos]
        if bos is not None and ids[:2] == [bos, bos]:
            # The template spells out the token that the tokenizer adds as well.
            ids, first = ids[1:], first - 1
        if first == 0:
            raise UserError(
                f"{where}: no token stands before the answer, so its first token cannot be scored; "
                "put text before {answer} in the template"
            )
        return TokenRow(ids, [IGNORE_INDEX] * first + ids[first:])

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
        return [TokenRow(row.input_ids[:limit], row.labels[:limit]) for row in rows]


def _parse_date(date: str) -> datetime:
    try:
        return datetime.strptime(date, "%d %b %Y")
    except ValueError:
        raise UserError(f'--data.chat_date must be a day such as "{CHAT_DATE_STRING}", got {date!r}') from None


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
