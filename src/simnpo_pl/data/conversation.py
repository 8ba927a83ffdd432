"""Chat messages as rows: the last answer of the assistant is what is scored, all before it is the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simnpo_pl.errors import UserError

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

    messages: tuple[tuple[str, str], ...]

    def __new__(cls, messages: Sequence[tuple[str, str]]) -> Conversation:  # noqa: D102
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


def _pairs(messages: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{where}: expected a list of messages, got {messages!r}; mend or remove the row")
    for message in messages:
        fields = message if isinstance(message, Mapping) else {}
        if not all(isinstance(fields.get(name), str) for name in ("role", "content")):
            raise UserError(f"{where}: expected messages with a role and a content, got {message!r}; mend the row")
    if not messages[-1]["content"].strip():
        raise UserError(f"{where}: the last message is blank; mend or remove the row")
    return [(message["role"], message["content"]) for message in messages]
