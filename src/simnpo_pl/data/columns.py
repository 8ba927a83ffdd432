"""The columns of a custom table: questions and answers, chat messages or plain text, under any names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from simnpo_pl.data.conversation import question_and_answer
from simnpo_pl.data.sources import Row, column_of, text_of
from simnpo_pl.utils.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read.

    A table with a question and an answer column holds questions and answers, else one with a messages column chats,
    else one with a text column plain text.

    Args:
        question: The question.
        answer: The answer to it.
        messages: A list of objects with `role` and `content`; the last is the assistant's, and is the answer.
        text: Plain text, all of which is scored.
        paraphrased_answer: The answer in other words; optional.
        perturbed_answer: A list of wrong answers, or in a CSV file such a list as JSON; optional.
        paraphrased_question: The question in other words, for attacks; optional.
    """

    question: str = "question"
    answer: str = "answer"
    messages: str = "messages"
    text: str = "text"
    paraphrased_answer: str = "paraphrased_answer"
    perturbed_answer: str = "perturbed_answer"
    paraphrased_question: str = "paraphrased_question"

    def read(self, table: Sequence[Mapping[str, Any]], source: str) -> list[Row] | list[str]:
        """The rows of a table: plain texts, or questions and answers with the optional columns that it has.

        Raises:
            UserError: The table has no such columns, or a row has no text where one is expected.
        """
        present = list(dict.fromkeys(name for row in table for name in row))
        places = [(row, f"{source} row {index}, counted from 0") for index, row in enumerate(table)]
        if (self.question in present and self.answer in present) or self.messages in present:
            return [self._question_and_answer(row, where, present) for row, where in places]
        if self.text in present:
            return [text_of(row, self.text, where) for row, where in places]
        missing = next(name for name, column in asdict(self).items() if column not in present)
        raise UserError(
            f"{source}: expected columns {self.question} and {self.answer}, or {self.messages}, or {self.text}; its "
            f"columns are: {', '.join(present) or 'none'}; name yours, as in --data.columns.{missing} NAME"
        )

    def _question_and_answer(self, row: Mapping[str, Any], where: str, present: Sequence[str]) -> Row:
        if self.question in present and self.answer in present:
            question, answer = text_of(row, self.question, where), text_of(row, self.answer, where)
        else:
            question, answer = question_and_answer(column_of(row, self.messages, where), where)
        made: Row = {"question": question, "answer": answer}
        for name in ("paraphrased_answer", "paraphrased_question"):
            if row.get(getattr(self, name)):
                made[name] = text_of(row, getattr(self, name), where)
        if row.get(self.perturbed_answer):
            made["perturbed_answer"] = _texts(row[self.perturbed_answer], self.perturbed_answer, where)
        return made


def _texts(value: Any, column: str, where: str) -> list[str]:
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{where}: expected a list of texts as {column}, got {value!r}; fix the row")
    return value
