"""The columns of a custom table: questions and answers, chat messages, plain text or records, under any names."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from string import Formatter
from typing import Any

from simnpo_pl.data.conversation import question_and_answer
from simnpo_pl.data.sources import Row, column_of, text_of, texts_of
from simnpo_pl.utils.errors import UserError, nearest

KNOWN = (("prompt", "completion"), ("instruction", "output"))
"""Question and answer columns of other projects, which are read without being named."""
INPUT = "input"
"""Optional column next to `instruction`: the text that the instruction is about."""


class Records:
    """Makes a question and an answer of a record, by texts with the names of its columns in braces.

    Raises:
        UserError: A text has no column in braces, or its braces do not match.
    """

    def __init__(self, question: str, answer: str) -> None:
        self.question, self.answer = question, answer
        found = [*_placeholders(question, "--data.template_question"), *_placeholders(answer, "--data.template_answer")]
        self.names = list(dict.fromkeys(found))

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        """The question and answer of one record; raises UserError where a value is missing or blank."""
        values = {name: row.get(name) for name in self.names}
        for name, value in values.items():
            if value is None or isinstance(value, list | dict) or not str(value).strip():
                raise UserError(f"{where}: expected a text or number as {name}, got {value!r:.80}; fix or remove it")
        return {"question": self.question.format_map(values), "answer": self.answer.format_map(values)}


def _placeholders(text: str, option: str) -> list[str]:
    try:
        names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        if "" in names:
            raise ValueError("empty braces")
    except ValueError as error:
        raise UserError(f"{option} {text!r}: {error}; write a column as {{name}}") from error
    if not names:
        raise UserError(f"{option} {text!r}: expected a column in braces, as in {{name}}")
    return names


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read.

    A table with a question and an answer column holds questions and answers, else one with a messages column chats,
    else one with `prompt` and `completion`, or `instruction`, `output` and perhaps `input`, questions and answers, else
    one with a text column plain text.

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

    def read(
        self, table: Sequence[Mapping[str, Any]], source: str, records: Records | None = None
    ) -> list[Row] | list[str]:
        """The rows of a table: plain texts, or questions and answers with the optional columns that it has.

        Messages call the table `source`; `records` makes the questions and answers of one that has one of its columns.

        Raises:
            UserError: The table has no such columns, or a row has no text where one is expected.
        """
        present = list(dict.fromkeys(name for row in table for name in row))
        places = [(row, f"{source} row {index}, counted from 0") for index, row in enumerate(table)]
        names = [] if records is None else records.names
        if records is not None and not set(present).isdisjoint(names):
            if unknown := [name for name in names if name not in present]:
                raise UserError(
                    f"{source}: no column {', '.join(unknown)} for --data.template_question and "
                    f"--data.template_answer{nearest(unknown[0], present)}; its columns are: {', '.join(present)}"
                )
            return [records.read(row, where) | self._optional(row, where) for row, where in places]
        pairs = ((self.question, self.answer), *([] if self.messages in present else KNOWN))
        for pair in pairs:
            if set(pair) <= set(present):
                return [_pair(row, *pair, where) | self._optional(row, where) for row, where in places]
        if self.messages in present:
            return [self._last_turn(row, where) | self._optional(row, where) for row, where in places]
        if self.text in present:
            return [text_of(row, self.text, where) for row, where in places]
        near = nearest(names[0], present) if names else ""
        missing = next(name for name, column in asdict(self).items() if column not in present)
        raise UserError(
            f"{source}: expected columns {' and '.join(names) or f'{self.question} and {self.answer}'}, or "
            f"{self.messages}, or {self.text}{near}; its columns are: {', '.join(present) or 'none'}; name yours, as "
            f"in --data.columns.{missing} NAME, or for records: --data.template_question and --data.template_answer"
        )

    def _last_turn(self, row: Mapping[str, Any], where: str) -> Row:
        question, answer = question_and_answer(column_of(row, self.messages, where), where)
        return {"question": question, "answer": answer}

    def _optional(self, row: Mapping[str, Any], where: str) -> Row:
        made: Row = {}
        for name in ("paraphrased_answer", "paraphrased_question"):
            if row.get(getattr(self, name)):
                made[name] = text_of(row, getattr(self, name), where)
        if wrong := row.get(self.perturbed_answer):
            # A CSV file holds the list as JSON.
            with suppress(TypeError, json.JSONDecodeError):
                wrong = json.loads(wrong)
            made["perturbed_answer"] = texts_of({self.perturbed_answer: wrong}, self.perturbed_answer, where)
        return made


def _pair(row: Mapping[str, Any], question: str, answer: str, where: str) -> Row:
    found = {"question": text_of(row, question, where), "answer": text_of(row, answer, where)}
    if question == "instruction" and row.get(INPUT):
        found["question"] += f"\n\n{text_of(row, INPUT, where)}"
    return found
