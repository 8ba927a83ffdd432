"""Chat messages as rows: the last answer of the assistant is what is scored, all before it is the prompt."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from simnpo_pl.utils.errors import UserError

Message = tuple[str, str]
AnswerEnd = Literal["turn", "eos"]

ANSWERS = "assistant"
"""Role of the messages that a model writes."""


class Conversation(str):
    """The messages before an answer; as a string, a line each with its role, for logs and comparisons.

    Only a chat template can turn it into a prompt.

    Args:
        messages: Role and text of each message, in order.

    Example:
        >>> Conversation([("system", "Be brief."), ("user", "Who?")])
        'system: Be brief.\\nuser: Who?'
    """

    messages: tuple[Message, ...]

    def __new__(cls, messages: Sequence[Message]) -> Conversation:
        self = super().__new__(cls, "\n".join(f"{role}: {text}" for role, text in messages))
        self.messages = tuple(messages)
        return self

    def __getnewargs__(self) -> tuple[Any]:
        return (self.messages,)


def question_and_answer(messages: Any, where: str) -> tuple[str, str]:
    """Prompt and answer of a conversation that ends with the assistant's message.

    Args:
        messages: Objects with `role` and `content`.
        where: What the row is called in messages.

    Returns:
        The question and the answer. A conversation of one question is that question, which any template takes;
        any other is a `Conversation`.

    Raises:
        UserError: The messages are no conversation, or the last one is not the assistant's.
    """
    found = _pairs(messages, where)
    role, answer = found[-1]
    if role != ANSWERS:
        raise UserError(f"{where}: expected the last message to be the {ANSWERS}'s, got one of {role!r}; mend the row")
    before = found[:-1]
    if not before:
        raise UserError(f"{where}: expected a message before the {ANSWERS}'s, got none; mend the row")
    alone = len(before) == 1 and before[0][0] == "user"
    return (before[0][1] if alone else Conversation(before)), answer


def _pairs(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: expected a list of messages, got {messages!r}; mend or remove the row")
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise UserError(f"{where}: expected messages with a role and a content, got {message!r}; mend the row")
    if not messages[-1]["content"].strip():
        raise UserError(f"{where}: the last message is blank; mend or remove the row")
    return [(message["role"], message["content"]) for message in messages]


class Placed(NamedTuple):
    """A text, and where in it an answer stands."""

    text: str
    start: int
    """First character of the answer."""
    stop: int
    """End of the answer; what follows ends the turn, and nothing follows where the tokenizer's EOS is to end it."""


class _Frame(NamedTuple):
    """What a chat template writes around an answer."""

    header: str
    """Between the prompt and the answer, such as an empty thought."""
    after: str
    """After the answer, to the end of the conversation."""
    end: str
    """The part of `after` that ends the turn; empty where the template writes none."""
    end_id: int | None
    """Last token of `end`; None where that is ordinary text, which does not stop a generation."""


class ChatTemplate:
    """Writes questions, or conversations, and their answers as a tokenizer's chat template does.

    Args:
        tokenizer: Has the template.
        date: Day told to the template, such as "26 Jul 2024".
        system_prompt: System message of conversations that have none of their own; None leaves it to the template.
        variables: Further variables that the template reads, such as `enable_thinking`.
        answer_end: `turn`: the whole conversation is written by the template, and the answer ends as a turn does
            there; `eos`: the answer follows the template's prompt, and the tokenizer's EOS ends it.

    Raises:
        UserError: The date is none, or the template does not read the variables.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        date: str,
        system_prompt: str | None = None,
        variables: Mapping[str, Any] | None = None,
        answer_end: AnswerEnd = "turn",
    ) -> None:
        day = parse_date(date)
        self.tokenizer, self.system_prompt, self.answer_end = tokenizer, system_prompt, answer_end
        # Templates may call this function even when given a date.
        self.template = re.sub(
            r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
            lambda match: repr(day.strftime(match[2])),
            tokenizer.get_chat_template(),
        )
        taken = {"date_string", *inspect.signature(tokenizer.apply_chat_template).parameters} - {"tools", "documents"}
        for name in variables or {}:
            if name in taken:
                raise UserError(f"--data.chat_template_kwargs: {name!r} is set by other options or fixed; leave it out")
            if not re.search(rf"\b{re.escape(name)}\b", self.template):
                raise UserError(f"--data.chat_template_kwargs: the chat template does not read {name!r}; leave it out")
        self.variables = {**(variables or {}), "date_string": date}
        self._settings = [f"dated {date}"]
        self._settings += [] if system_prompt is None else [f"system prompt {system_prompt!r}"]
        self._settings += [f"variables {dict(variables)}"] if variables else []

    @property
    def description(self) -> str:
        """The form of the prompt in a few words, for logs."""
        end = f"answers end with {self.end or self.tokenizer.eos_token!r}"
        return ", ".join(["the tokenizer's chat template", *self._settings, end])

    @property
    def end(self) -> str:
        """Text that ends an answer; empty where the tokenizer's EOS does."""
        return self._frame.end if self.answer_end == "turn" else ""

    @property
    def end_id(self) -> int | None:
        """The token that ends an answer, where that is one of the tokenizer's added tokens."""
        return self._frame.end_id if self.answer_end == "turn" else None

    def place(self, question: str, answer: str, where: str) -> Placed:
        """The text of a question or conversation with its answer, up to the end of the answer's turn.

        Args:
            question: A question or `Conversation`.
            answer: The answer.
            where: What the row is called in messages.

        Raises:
            UserError: The template refuses the messages, changes the answer, or writes the conversation with the
                answer otherwise than without it.
        """
        messages = question.messages if isinstance(question, Conversation) else (("user", question),)
        prompt = self._write(messages, where, prompt=True)
        if self.answer_end == "eos":
            return Placed(prompt + answer, len(prompt), len(prompt + answer))
        header, after, end, _ = self._frame
        whole = self._write((*messages, (ANSWERS, answer)), where)
        _check_beginning(prompt, whole, where)
        stop = len(whole) - len(after)
        if not whole.endswith(after) or answer.strip() not in whole[len(prompt) : stop]:
            raise UserError(
                f"{where}: the chat template changes the answer, to {whole[len(prompt) :][:80]!r}; change the row, or "
                "set --data.answer_end eos"
            )
        # A thought that is part of the answer stands where the template would write an empty one.
        start = len(prompt + header) if whole.startswith(prompt + header) else len(prompt)
        return Placed(whole[: stop + len(end)], start, stop)

    @cached_property
    def _frame(self) -> _Frame:
        answer, where = "An answer.", "every conversation"
        messages = (("user", "A question?"),)
        prompt = self._write(messages, where, prompt=True)
        whole = self._write((*messages, (ANSWERS, answer)), where)
        _check_beginning(prompt, whole, where)
        header, found, after = whole[len(prompt) :].rpartition(answer)
        if not found:
            raise UserError("the chat template leaves out the assistant's messages; set --data.answer_end eos")
        added = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        # Some tokenizers have added tokens of white space.
        longest_first = sorted((re.escape(token) for token in added if token.strip()), key=len, reverse=True)
        if longest_first and (match := re.search("|".join(longest_first), after)):
            return _Frame(header, after, after[: match.end()], added[match[0]])
        return _Frame(header, after, after.rstrip(), None)

    def _write(self, messages: Sequence[Message], where: str, prompt: bool = False) -> str:
        """Messages as the template writes them, with the system message of the option where they have none."""
        from jinja2 import TemplateError

        system = None if messages[0][0] == "system" else self.system_prompt
        try:
            text = self._apply(messages if system is None else [("system", system), *messages], prompt)
        except TemplateError as error:
            if system is not None:
                with suppress(TemplateError):
                    self._apply(messages, prompt)
                    reason = f"the chat template refuses a system message ({error}); set it to null"
                    raise UserError(f"--data.system_prompt: {reason}") from error
            raise UserError(f"{where}: the chat template refuses these messages ({error}); change the row") from error
        if system is not None and system.strip() not in text:
            raise UserError("--data.system_prompt: the chat template leaves out the system message; set it to null")
        return text

    def _apply(self, messages: Sequence[Message], prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=self.template,
            add_generation_prompt=prompt,
            tokenize=False,
            **self.variables,
        )
        assert isinstance(text, str)
        return text


def parse_date(date: str) -> datetime:
    """A day such as "26 Jul 2024".

    Raises:
        UserError: It is none.
    """
    try:
        return datetime.strptime(date, "%d %b %Y")
    except ValueError:
        raise UserError(f'--data.chat_date must be a day such as "26 Jul 2024", got {date!r}') from None


def _check_beginning(prompt: str, whole: str, where: str) -> None:
    """Refuses a conversation that does not begin with its prompt: a model would answer another text than is scored."""
    if not whole.startswith(prompt):
        same = next(place for place, (one, other) in enumerate(zip_longest(prompt, whole)) if one != other)
        raise UserError(
            f"{where}: the chat template goes on with {prompt[same:][:40]!r} where an answer is asked for, and with "
            f"{whole[same:][:40]!r} where it is given; make them agree with --data.chat_template_kwargs, or write "
            "the prompt with --data.template"
        )
