"""Chat messages as rows: the assistant's last answer is scored, all before it is the prompt."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from simnpo_pl.utils.errors import UserError

Message = tuple[str, str]
AnswerEnd = Literal["turn", "eos"]


class Conversation(str):
    """The messages before an answer; only chat templates take it. As a string it has one line per message, for logs."""

    messages: tuple[Message, ...]

    def __new__(cls, messages: Sequence[Message]) -> "Conversation":
        self = super().__new__(cls, "\n".join(f"{role}: {text}" for role, text in messages))
        self.messages = tuple(messages)
        return self

    def __getnewargs__(self) -> tuple[Any]:
        return (self.messages,)


def messages_of(question: str) -> tuple[Message, ...]:
    """A conversation's messages; a plain question is one of the user."""
    return question.messages if isinstance(question, Conversation) else (("user", question),)


def question_and_answer(messages: Any, where: str) -> tuple[str, str]:
    """Prompt and answer of a conversation, a list of objects with `role` and `content` that the assistant ends.

    A single question is returned as a string, which any template takes, all else as a `Conversation`. `where` names the
    row in messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: expected a list of messages, got {messages!r}; fix or remove the row")
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise UserError(f"{where}: expected messages with a role and a content, got {message!r}; fix the row")
    *before, (role, answer) = [(message["role"], message["content"]) for message in messages]
    if role != "assistant" or not answer.strip() or not before:
        found = f"{len(messages)} messages with {messages[-1]!r} as the last"
        raise UserError(f"{where}: expected messages and then the assistant's answer, got {found}; fix the row")
    is_question = len(before) == 1 and before[0][0] == "user"
    return (before[0][1] if is_question else Conversation(before)), answer


class Placed(NamedTuple):
    """A text, and which characters of it are the answer: from `start` to before `stop`.

    What follows `stop` ends the turn; nothing follows where the tokenizer's EOS is to end it.
    """

    text: str
    start: int
    stop: int


class _Frame(NamedTuple):
    """What a chat template writes around an answer; empty where the tokenizer's EOS ends it."""

    header: str = ""  # between the prompt and the answer, such as an empty thought
    after: str = ""  # after the answer, to the end of the conversation
    end: str = ""  # the part of `after` that ends the turn; empty where the template writes none
    end_id: int | None = None  # last token of `end`; None where that is ordinary text, which stops no generation


@dataclass(eq=False)
class ChatTemplate:
    """Writes questions, or conversations, and their answers as a tokenizer's chat template does.

    The answer ends, with `answer_end` `turn`, as a turn does where the template writes the whole conversation; with
    `eos` it follows the template's prompt, and the tokenizer's EOS ends it. `variables` are what the template reads.

    Raises:
        UserError: The date is malformed, or the template does not read the variables or the system message.
    """

    tokenizer: PreTrainedTokenizerBase
    date: str
    system_prompt: str | None = None
    variables: Mapping[str, Any] | None = None
    answer_end: AnswerEnd = "turn"

    def __post_init__(self) -> None:
        day = parse_date(self.date)
        # Templates may call this function even when given a date; transformers gives them no other one.
        self._template = re.sub(
            r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
            lambda match: repr(day.strftime(match[2])),
            self.tokenizer.get_chat_template(),
        )
        options = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
        for name in self.variables or {}:
            if name in {"date_string", *options}:
                raise UserError(f"--data.chat_template_kwargs: {name!r} is set by other options or fixed; leave it out")
            if not re.search(rf"\b{re.escape(name)}\b", self._template):
                raise UserError(f"--data.chat_template_kwargs: the chat template does not read {name!r}; leave it out")
        if self.system_prompt is not None:
            self._check_system_prompt(self.system_prompt)

    @property
    def description(self) -> str:
        """The form of the prompt in a few words, for logs."""
        system = f", system prompt {self.system_prompt!r}" if self.system_prompt is not None else ""
        variables = f", variables {dict(self.variables)}" if self.variables else ""
        end = f", answers end with {self.frame.end or self.tokenizer.eos_token!r}"
        return f"the tokenizer's chat template, dated {self.date}{system}{variables}{end}"

    def place(self, question: str, answer: str, where: str) -> Placed:
        """The text of a question or conversation with its answer, up to the end of the answer's turn.

        Raises:
            UserError: The template refuses the messages, changes the answer, or writes another prompt with the answer
                than without it; `where` names the row.
        """
        messages = messages_of(question)
        if self.answer_end == "eos":
            prompt = self._write(messages, where, prompt=True)
            return Placed(prompt + answer, len(prompt), len(prompt + answer))
        header, after, end, _ = self.frame
        prompt, rest = self._write_both(messages, answer, where)
        if not rest.endswith(after) or answer.strip() not in rest.removesuffix(after):
            changed = f"the chat template changes the answer, to {rest[:80]!r}"
            raise UserError(f"{where}: {changed}; change the row, or set --data.answer_end eos")
        # An answer that starts with a thought has it in the place of the template's empty one.
        start = len(prompt + header) if rest.startswith(header) else len(prompt)
        stop = len(prompt + rest) - len(after)
        return Placed((prompt + rest)[: stop + len(end)], start, stop)

    @cached_property
    def frame(self) -> _Frame:
        """What the template writes around an answer, from a sample."""
        if self.answer_end == "eos":
            return _Frame()
        answer = "An answer."
        _, rest = self._write_both((("user", "A question?"),), answer, "every conversation")
        header, found, after = rest.rpartition(answer)
        if not found:
            raise UserError("the chat template leaves out the assistant's messages; set --data.answer_end eos")
        added = {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items()}
        # Some tokenizers have added tokens of white space.
        longest_first = sorted((re.escape(token) for token in added if token.strip()), key=len, reverse=True)
        if longest_first and (match := re.search("|".join(longest_first), after)):
            return _Frame(header, after, after[: match.end()], added[match[0]])
        return _Frame(header, after, after.rstrip())

    def _check_system_prompt(self, system: str) -> None:
        reason = "leaves out the system message"
        try:
            if system.strip() in self._apply([("system", system), ("user", "A question?")], prompt=True):
                return
        except TemplateError as error:
            reason = f"refuses a system message ({error})"
        raise UserError(f"--data.system_prompt: the chat template {reason}; set it to null")

    def _write_both(self, messages: Sequence[Message], answer: str, where: str) -> tuple[str, str]:
        """The prompt, and what the template writes after it where the answer is given."""
        prompt = self._write(messages, where, prompt=True)
        whole = self._write([*messages, ("assistant", answer)], where)
        if not whole.startswith(prompt):
            # A model would answer another text than is scored.
            same = next(i for i, (one, other) in enumerate(zip_longest(prompt, whole)) if one != other)
            raise UserError(
                f"{where}: the chat template continues with {prompt[same:][:40]!r} where an answer is asked for, and "
                f"with {whole[same:][:40]!r} where it is given; make them agree with --data.chat_template_kwargs, or "
                "write the prompt with --data.template"
            )
        return prompt, whole.removeprefix(prompt)

    def _write(self, messages: Sequence[Message], where: str, prompt: bool = False) -> str:
        if self.system_prompt is not None and messages[0][0] != "system":
            messages = [("system", self.system_prompt), *messages]
        try:
            return self._apply(messages, prompt)
        except TemplateError as error:
            raise UserError(f"{where}: the chat template refuses these messages ({error}); change the row") from error

    def _apply(self, messages: Sequence[Message], prompt: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=self._template,
            add_generation_prompt=prompt,
            tokenize=False,
            **(self.variables or {}),
            date_string=self.date,
        )
        assert isinstance(text, str)
        return text


def parse_date(date: str) -> datetime:
    """A day such as "26 Jul 2024"; raises UserError for anything else."""
    try:
        return datetime.strptime(date, "%d %b %Y")
    except ValueError:
        raise UserError(f'--data.chat_date must be a day such as "26 Jul 2024", got {date!r}') from None
