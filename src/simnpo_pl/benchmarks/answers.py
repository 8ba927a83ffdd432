"""What the start model answers, as training rows: alternatives to forget answers, retain rows where there are none."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from simnpo_pl.data.sources import load_table, texts_of
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.data.training import Rows, questions_of
from simnpo_pl.evaluation.data import EvalData
from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Generation, Split
from simnpo_pl.metrics.functional import words
from simnpo_pl.metrics.generated import holds
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json_lines

ALTERNATES = "alternates.jsonl"
"""In a run's folder: each forget question with its alternatives."""
LONGEST_ALTERNATE = 200
"""Tokens of an alternative at most."""
REQUEST = (
    "Question: {question}\nAnswer: {answer}\n"
    "Write another answer to this question, in the same form but with different plausible facts."
)
READS_ALTERNATES = "reads other answers to questions"
START_ANSWERS = "retain_auto.jsonl"
"""In a run's folder: the retain rows of `--data.retain auto`."""
PROMPTS = Path(__file__).with_name("neutral_prompts.jsonl")
LONGEST_KEPT = 80
"""Tokens of an answer to a neutral prompt at most."""
FEWEST = 20
"""Rows below which a model's own answers are too few to keep it whole."""
Answer = Callable[[EvalData], EvalResult]
"""Evaluates the start model on a data module."""


def asking(
    questions: Sequence[str],
    name: str,
    encoder: PromptTemplate,
    eval: EvalOptions,
    longest: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> EvalData:
    """An evaluation in which questions, each as often as it comes, are answered and nothing is scored.

    An answer has at most `longest` tokens, and half of short sequences is left to the prompt. At `temperature` 0 it is
    greedy, else a draw of `seed`.
    """
    # Any word: a space before the answer belongs to its first token, and not to the prompt.
    prompts = [row.prompt_ids for row in encoder.encode_rows([(question, "The") for question in questions], name)]
    generation = Generation(prompts, _at_most(longest, encoder), encoder.finish, lambda text, answer: {})
    texts = [{"question": question, "answer": ""} for question in questions]
    tokenizer: Any = encoder.tokenizer
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    evaluation = Evaluation([Split(name, texts, [], {}, generation)], {}, {}, decode)
    evaluation.temperature, evaluation.seed = temperature, seed
    data = EvalData(eval, evaluation)
    data.end_ids = encoder.end_ids
    return data


def sample_alternates(
    forget: Rows, count: int, encoder: PromptTemplate, eval: EvalOptions, seed: int, answer: Answer
) -> list[dict[str, Any]]:
    """Each forget question with what the start model answers, at temperature 1, when asked for other plausible facts.

    Of `count` answers to each those are left out that are blank, too long, repeated, or the forget answer itself.

    Raises:
        UserError: The rows are plain text, or a row has no answer left.
    """
    rows, limit = questions_of(forget, READS_ALTERNATES), encoder.max_length or math.inf
    asked = [REQUEST.format(question=row["question"], answer=row["answer"]) for row in rows for _ in range(count)]
    data = asking(asked, "alternates", encoder, eval, LONGEST_ALTERNATE, temperature=1.0, seed=seed)
    texts = [row["generation"] for row in answer(data).rows]
    unlimited = replace(encoder, max_length=None)
    made = []
    for number, row in enumerate(rows):
        drawn = dict.fromkeys(texts[number * count : (number + 1) * count])
        kept = [text for text in drawn if text and text != row["answer"].strip()]
        kept = [text for text in kept if len(unlimited.encode(row["question"], text).input_ids) <= limit]
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
    rows, option = questions_of(forget, READS_ALTERNATES), f"--data.alternates {file}"
    found = load_table(file, "--data.alternates", ["question", "alternates"])
    if len(found) != len(rows):
        raise UserError(f"{option}: expected a line for each of {len(rows)} forget rows, got {len(found)}")
    for number, (line, row) in enumerate(zip(found, rows, strict=True), start=1):
        if line["question"] != row["question"]:
            wanted = f"expected the question {row['question'][:80]!r}, got {line['question']!r}"
            raise UserError(f"{option}: line {number}: {wanted}")
    return [texts_of(line, "alternates", f"{option}: line {number}") for number, line in enumerate(found, start=1)]


def neutral_prompts(encoder: PromptTemplate, eval: EvalOptions) -> EvalData:
    """Greedy answers to the neutral prompts, as an evaluation."""
    questions = [row["question"] for row in load_table(str(PROMPTS), "--data.retain auto")]
    return asking(questions, "neutral", encoder, eval, LONGEST_KEPT)


def keep_answers(
    rows: Sequence[Mapping[str, Any]], forget: Collection[str], encoder: PromptTemplate
) -> list[dict[str, str]]:
    """Generated answers as retain rows, but for blank ones, too long rows, and answers that hold a forget answer.

    An answer that was cut at its largest length ends with its last whole sentence.
    """
    secret, unlimited = [words(answer) for answer in forget], replace(encoder, max_length=None)
    kept = []
    for row in rows:
        question, answer = row["question"], row["generation"]
        said = words(answer)
        if not answer or any(holds(said, known) for known in secret):
            continue
        tokens = unlimited.encode(question, answer)
        if tokens.length >= _at_most(LONGEST_KEPT, encoder) and (
            whole := re.match(r".*[.!?](?=\s)", answer, flags=re.DOTALL)
        ):
            answer = whole[0]
        if len(tokens.input_ids) <= (encoder.max_length or math.inf):
            kept.append({"question": question, "answer": answer})
    if len(kept) < FEWEST:
        raise UserError(
            f"--data.retain auto: the start model gives only {len(kept)} of {len(rows)} neutral prompts an answer that "
            "can be kept; give --data.retain FILE with rows to keep"
        )
    return kept


def write_rows(trainer: Any, file: Path, rows: Sequence[Any]) -> None:
    """Write made rows; every process waits for the file."""
    if trainer.is_global_zero:
        write_json_lines(file, rows)
    trainer.strategy.barrier()


def _at_most(longest: int, encoder: PromptTemplate) -> int:
    return min(longest, (encoder.max_length or 2 * longest) // 2)
