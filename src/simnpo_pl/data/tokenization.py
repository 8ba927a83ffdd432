"""Turns a question and its answer into token ids, with labels on the answer.

Prompt and answer are tokenized together, because a token may hold the end of one and the start of the other; character
offsets then say which tokens hold the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from simnpo_pl.data.conversation import AnswerEnd, ChatTemplate, Conversation, Placed, messages_of, parse_date
from simnpo_pl.utils.errors import UserError

IGNORE_INDEX = -100
"""Label of a token that is not scored."""
PLAIN_TEMPLATE = "Question: {question}\nAnswer: {answer}"
"""Used where neither the user nor the tokenizer has a template."""
CHAT_DATE_STRING = "26 Jul 2024"
"""Default date for chat templates: some write today's, and results would change from day to day."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of one prompt with its answer, or of one text.

    Args:
        input_ids: All T ids.
        labels: T labels: the id itself where it is scored, else IGNORE_INDEX. They are not shifted: a scored id is
            predicted from the ids before it.
        end: How many of the last ids are scored as the end of the answer; 0 where it was cut, and for plain text.
        row: Its index in the data set, where that is not its place in the list.
    """

    input_ids: list[int]
    labels: list[int]
    end: int = 0
    row: int | None = None

    @property
    def length(self) -> int:
        """Number of scored tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def prompt_ids(self) -> list[int]:
        """The ids before the first scored one, from which a generated answer starts."""
        scored = (index for index, label in enumerate(self.labels) if label != IGNORE_INDEX)
        return self.input_ids[: next(scored, len(self.input_ids))]


@dataclass(eq=False)
class PromptTemplate:
    """Encodes question-answer pairs with one tokenizer and one form of prompt.

    Args:
        tokenizer: A fast tokenizer (one that reports character offsets) with an end-of-sequence token.
        template: Text with `{question}` and, at its end, `{answer}`, each once; other braces are literal.
            None takes the tokenizer's chat template, or PLAIN_TEMPLATE where it has none.
        max_length: Maximum tokens of a sequence, the end of the answer included; None sets no limit.
        truncate: Cut the answers of longer sequences at the end instead of refusing the data.
        system_prompt: System message of conversations that have none; None leaves it to the chat template.
        date: The date that a chat template is given.
        answer_end: See `ChatTemplate`; without a chat template an answer ends with the end-of-sequence token.
        chat_template_kwargs: Variables of the chat template, such as `enable_thinking`.

    Raises:
        UserError: The tokenizer, the template or an option cannot be used, or `max_length` is below 1.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    max_length: int | None = None
    truncate: bool = False
    system_prompt: str | None = None
    date: str = CHAT_DATE_STRING
    answer_end: AnswerEnd = "turn"
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        kind = type(self.tokenizer).__name__
        if not self.tokenizer.is_fast:
            raise UserError(f"expected a fast tokenizer, got {kind} without offsets: use one with tokenizer.json")
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer ({kind}) has no end-of-sequence token: set its eos_token")
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length must be at least 1 token, got {self.max_length}: raise it or leave it out")
        parse_date(self.date)
        self.chat: ChatTemplate | None = None
        if self.template is None and self.tokenizer.chat_template is not None:
            variables = self.chat_template_kwargs
            self.chat = ChatTemplate(self.tokenizer, self.date, self.system_prompt, variables, self.answer_end)
        elif self.chat_template_kwargs:
            raise UserError("--data.chat_template_kwargs: no chat template is used here; leave it out")
        self._text = text = PLAIN_TEMPLATE if self.template is None else self.template
        self._before, _, self._between = text.removesuffix("{answer}").partition("{question}")
        if [text.count("{question}"), text.count("{answer}")] != [1, 1] or not text.endswith("{answer}"):
            wanted = f"expected {{question}} and, at the very end, {{answer}}, once each, as in {PLAIN_TEMPLATE!r}"
            raise UserError(f"--data.template: {wanted}, got {text!r}")

    @property
    def description(self) -> str:
        """The form of the prompt in a few words, for logs."""
        return f"template {self._text!r}" if self.chat is None else self.chat.description

    @cached_property
    def end_ids(self) -> set[int]:
        """Tokens that end an answer."""
        ends = [self.tokenizer.eos_token_id, None if self.chat is None else self.chat.frame.end_id]
        return {int(end) for end in ends if end is not None}

    def finish(self, generated: str) -> str:
        """A generated answer up to the end of the turn, where that is ordinary text, which stops no generation."""
        ordinary = self.chat is not None and self.chat.frame.end_id is None and self.chat.frame.end
        return (generated.split(ordinary)[0] if ordinary else generated).strip()

    def after_examples(self, question: str, examples: Sequence[tuple[str, str]]) -> str:
        """A question after examples of questions with answers: turns of a chat template, else text in its own form."""
        if self.chat is not None:
            turns = [turn for one, answer in examples for turn in (*messages_of(one), ("assistant", answer))]
            # Templates take system messages at the beginning alone.
            return Conversation(sorted([*turns, *messages_of(question)], key=lambda turn: turn[0] != "system"))
        return "".join(f"{one}{self._between}{answer}\n\n{self._before}" for one, answer in examples) + question

    def encode(self, question: str, answer: str) -> TokenRow:
        """Encodes one pair."""
        return self.encode_rows([(question, answer)], "given")[0]

    def encode_rows(self, pairs: Sequence[tuple[str, str]], name: str) -> list[TokenRow]:
        """Encodes questions, or conversations, with their answers.

        Scored are all tokens that hold a character of the answer and those that end it. Messages call the rows `name`.

        Raises:
            UserError: An answer yields no token or holds one that ends answers, a prompt is empty, the chat template
                refuses a row, or a sequence is longer than `max_length` (with `truncate`: its prompt alone).
        """
        if not pairs:
            return []
        wheres = [f"{name} row {i}, counted from 0 (question {q[:80]!r})" for i, (q, _) in enumerate(pairs)]
        placed = [self._place(*pair, where) for pair, where in zip(pairs, wheres, strict=True)]
        encoded = self.tokenizer(
            [text for text, _, _ in placed],
            # The text of a chat template has its special tokens.
            add_special_tokens=self.chat is None,
            return_offsets_mapping=True,
            verbose=False,
        )
        parts = zip(encoded["input_ids"], encoded["offset_mapping"], placed, wheres, strict=True)
        rows = [self._label(*part) for part in parts]
        return limit_rows(rows, self.max_length, self.truncate, f"{name} rows")

    def _place(self, question: str, answer: str, where: str) -> Placed:
        if self.chat is not None:
            placed = self.chat.place(question, answer, where)
        elif isinstance(question, Conversation):
            advice = "leave out --data.template, or give a tokenizer that has one"
            raise UserError(f"{where}: a conversation needs a chat template; {advice}")
        else:
            prompt = self._before + question + self._between
            placed = Placed(prompt + answer, len(prompt), len(prompt + answer))
        check_unicode(placed.text, where)
        return placed

    def _label(self, ids: list[int], offsets: Sequence[tuple[int, int]], placed: Placed, where: str) -> TokenRow:
        """Cuts off what follows the answer, adds the end-of-sequence unless the text has an end, marks what is scored.

        A token holds part of the answer exactly when it ends after the answer starts. Its own start says
        less: some tokenizers trim leading spaces from offsets, down to an empty span. Special tokens added
        around the text have the span (0, 0).
        """
        held = [index for index, (_, end) in enumerate(offsets) if end > placed.start]
        end = sum(offsets[index][0] >= placed.stop and offsets[index][1] > placed.stop for index in held)
        if len(held) == end:
            raise UserError(f"{where}: the tokenizer makes no token of the answer; fix or remove the row")
        first, last = held[0], held[-1]
        if found := self.end_ids.intersection(ids[first : last + 1 - end]):
            token = self.tokenizer.convert_ids_to_tokens(min(found))
            raise UserError(f"{where}: the answer holds {token!r}, which ends answers; remove it from the text")
        ids = ids[: last + 1]
        if placed.stop == len(placed.text):
            ids, end = [*ids, self.tokenizer.eos_token_id], 1
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            # One from the template, one from the tokenizer.
            ids, first = ids[1:], first - 1
        if first == 0:
            reason = "no token before the answer, so that its first token cannot be scored"
            raise UserError(f"{where}: {reason}; put text before {{answer}} in the template")
        return TokenRow(ids, [IGNORE_INDEX] * first + ids[first:], end)


def limit_rows(rows: list[TokenRow], limit: int | None, truncate: bool, name: str) -> list[TokenRow]:
    """Refuses rows of more tokens than a limit; with `truncate` cuts them, and refuses prompts that fill the limit."""
    lengths = [len(row.input_ids) for row in rows]
    if limit is None or max(lengths, default=0) <= limit:
        return rows
    if not truncate:
        count = sum(length > limit for length in lengths)
        raise UserError(
            f"{count} of {len(rows)} {name} are longer than max_length = {limit} tokens, the longest has "
            f"{max(lengths)}: raise --data.max_length, or cut them at the end with --data.truncate true"
        )
    for index, row in enumerate(rows):
        if len(row.prompt_ids) >= limit:
            where = f"{name}: row {index}, counted from 0: the prompt alone has {len(row.prompt_ids)} tokens"
            raise UserError(f"{where}, of at most max_length = {limit}: raise it or remove the row")
    ends = [max(row.end - max(length - limit, 0), 0) for row, length in zip(rows, lengths, strict=True)]
    return [TokenRow(r.input_ids[:limit], r.labels[:limit], end) for r, end in zip(rows, ends, strict=True)]


def check_unicode(text: str, where: str) -> None:
    """Refuses halves of surrogate pairs, which JSON escapes can write and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {text[error.start]!r} is not a character; fix or remove the row") from error
