"""What the start model answers, as training rows: the evaluation that generates, and alternatives to forget answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from simnpo_pl.data.sources import load_jsonl
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.data.training import Rows
from simnpo_pl.evaluation.data import EvaluationData
from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Generation, Split
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json_lines

ALTERNATES = "alternates.jsonl"
"""In a run's folder: each forget question with its alternatives."""
LONGEST = 200
"""Tokens of an alternative at most."""
REQUEST = (
    "Question: {question}\nAnswer: {answer}\n"
    "Write another answer to this question, in the same form but with different plausible facts."
)
Answer = Callable[[Any], EvalResult]
"""Evaluates the start model on a data module."""


class StartAnswers(EvaluationData):
    """Replaces a benchmark in an evaluation: answers to questions are generated, nothing is scored.

    Args:
        name: Of the split.
        questions: A question may come several times, to sample several answers.
        encoder: Of the prompts.
        eval: Says how many prompts are generated together.
        longest: Tokens of an answer at most; half of short sequences is left to the prompt.
        temperature: 0 is greedy.
        seed: Of the draws.
    """

    def __init__(
        self,
        name: str,
        questions: Sequence[str],
        encoder: PromptTemplate,
        eval: EvalOptions,
        longest: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        # Any word: a space before the answer belongs to its first token, and not to the prompt.
        encoded = encoder.encode_rows([(question, "The") for question in questions], name)
        prompts = [row.prompt_ids for row in encoded]
        generation = Generation(prompts, at_most(longest, encoder), encoder.finish, lambda text, answer: {})
        tokenizer: Any = encoder.tokenizer
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        rows = [{"question": question, "answer": ""} for question in questions]
        evaluation = Evaluation([Split(name, rows, [], {}, generation)], {}, {}, decode)
        evaluation.temperature, evaluation.seed = temperature, seed
        super().__init__(evaluation, eval, end_ids=encoder.end_ids)


def at_most(longest: int, encoder: PromptTemplate) -> int:
    """Tokens of an answer at most; half of short sequences is left to the prompt."""
    return min(longest, (encoder.max_length or 2 * longest) // 2)


def sample_alternates(
    forget: Rows, count: int, encoder: PromptTemplate, eval: EvalOptions, seed: int, answer: Answer
) -> list[dict[str, Any]]:
    """Each forget question with what the start model answers, at temperature 1, when asked for other plausible facts.

    Blank and too long answers, repeated ones and those that are the forget answer are left out.

    Args:
        forget: Forget rows.
        count: Answers to sample for each.
        encoder: Of the prompts.
        eval: See `StartAnswers`.
        seed: Of the draws.
        answer: Evaluates the start model.

    Raises:
        UserError: The rows are plain text, or a row has no answer left.
    """
    rows = _questions(forget)
    asked = [REQUEST.format(question=row["question"], answer=row["answer"]) for row in rows for _ in range(count)]
    unlimited = replace(encoder, max_length=None)
    prompts = StartAnswers("alternates", asked, encoder, eval, LONGEST, temperature=1.0, seed=seed)
    texts = [row["generation"] for row in answer(prompts).rows]
    made = []
    for number, row in enumerate(rows):
        own = dict.fromkeys(texts[number * count : (number + 1) * count])
        kept = [text for text in own if text and text != row["answer"].strip()]
        if encoder.max_length is not None:
            lengths = [len(unlimited.encode(row["question"], text).input_ids) for text in kept]
            kept = [text for text, n in zip(kept, lengths, strict=True) if n <= encoder.max_length]
        made.append({"question": row["question"], "alternates": kept})
    missing = sum(not row["alternates"] for row in made)
    if missing:
        raise UserError(
            f"the start model gives no usable alternative to the answers of {missing} of {len(rows)} forget rows, of "
            f"{count} sampled for each: raise --data.alternates, or give --data.alternates FILE"
        )
    return made


def read_alternates(file: str, forget: Rows) -> list[list[str]]:
    """Alternatives to the answer of each forget row, from a file with one line for each row, in their order.

    Raises:
        UserError: The file does not fit the rows, or the rows are plain text.
    """
    rows, option = _questions(forget), f"--data.alternates {file}"
    found = load_jsonl(file, ["question", "alternates"])
    if len(found) != len(rows):
        raise UserError(f"{option}: expected a line for each of {len(rows)} forget rows, got {len(found)}")
    for number, (line, row) in enumerate(zip(found, rows, strict=True)):
        where, texts = f"{option}: line {number + 1}", line["alternates"]
        if line["question"] != row["question"]:
            raise UserError(f"{where}: expected the question {row['question'][:80]!r}, got {line['question']!r}")
        if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
            raise UserError(f"{where}: expected a list of answers as alternates, got {texts!r}")
    return [line["alternates"] for line in found]


def write_rows(trainer: Any, file: Path, rows: Sequence[Any]) -> None:
    """Write made rows; every process waits for the file."""
    if trainer.is_global_zero:
        write_json_lines(file, rows)
    trainer.strategy.barrier()


def _questions(rows: Rows) -> list[Mapping[str, Any]]:
    if isinstance(rows, Texts):
        raise UserError("this objective reads other answers to questions, but the forget rows are plain text")
    return list(rows)
