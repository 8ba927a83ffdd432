"""The columns of a table of one's own: questions and answers, chat messages or plain text, under any names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from simnpo_pl.data.conversation import question_and_answer
from simnpo_pl.utils.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; all others are left alone.

    A table with a question and an answer column holds questions and answers, else one with a messages column chats,
    else one with a text column plain text.

    Args:
        question: The question.
        answer: The answer to it.
        messages: A list of objects with `role` and `content`; the last is the assistant's, and is the answer.
        text: Plain text, all of which is scored.
        paraphrased_answer: The answer in other words; optional.
        perturbed_answer: A list of wrong answers, or in a CSV file such a list as JSON; optional.
    """

    question: str = "question"
    answer: str = "answer"
    messages: str = "messages"
    text: str = "text"
    paraphrased_answer: str = "paraphrased_answer"
    perturbed_answer: str = "perturbed_answer"

    def read(self, table: Sequence[Mapping[str, Any]], source: str) -> list[Row] | list[str]:
        """The rows of a table.

        Args:
            table: At least one row.
            source: Where it comes from, for messages.

        Returns:
            Plain texts; or rows with `question` and `answer` and, where the table has them, `paraphrased_answer` and
            `perturbed_answer`.

        Raises:
            UserError: The table has no such columns, or a row has no text where one is expected.
        """
        present = list(dict.fromkeys(name for row in table for name in row))
        if self.question in present and self.answer in present:
            pairs = [self._pair(row, where) for row, where in _places(table, source)]
        elif self.messages in present:
            pairs = [
                question_and_answer(_held(row, self.messages, where), where) for row, where in _places(table, source)
            ]
        elif self.text in present:
            return [_text(row, self.text, where) for row, where in _places(table, source)]
        else:
            wanted = f"{self.question} and {self.answer}, or {self.messages}, or {self.text}"
            missing = next(name for name, column in asdict(self).items() if column not in present)
            raise UserError(
                f"{source}: expected columns {wanted}; its columns are: {', '.join(present) or 'none'}; name yours, as "
                f"in --data.columns.{missing} NAME"
            )
        rows: list[Row] = [{"question": question, "answer": answer} for question, answer in pairs]
        for row, (given, where) in zip(rows, _places(table, source), strict=True):
            if given.get(self.paraphrased_answer):
                row["paraphrased_answer"] = _text(given, self.paraphrased_answer, where)
            if given.get(self.perturbed_answer):
                row["perturbed_answer"] = _texts(given[self.perturbed_answer], self.perturbed_answer, where)
        return rows

    def _pair(self, row: Mapping[str, Any], where: str) -> tuple[str, str]:
        return _text(row, self.question, where), _text(row, self.answer, where)


def _places(table: Sequence[Mapping[str, Any]], source: str) -> list[tuple[Mapping[str, Any], str]]:
    return [(row, f"{source} row {index}, counted from 0") for index, row in enumerate(table)]


def _held(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise UserError(f"{where} has no {column}; its columns are: {', '.join(row) or 'none'}")
    return row[column]


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = _held(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: expected text as {column}, got {value!r}; mend or remove the row")
    return value


def _texts(value: Any, column: str, where: str) -> list[str]:
    """A list of texts, which a CSV file holds as JSON."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{where}: expected a list of texts as {column}, got {value!r}; mend the row")
    return value
