"""Retain rows where the user has none: what the start model itself answers to neutral prompts."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from simnpo_pl.benchmarks.answers import StartAnswers, at_most
from simnpo_pl.data.sources import load_jsonl
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.utils.errors import UserError

AUTO = "auto"
"""Value of `--data.retain` that asks for these rows."""
START_ANSWERS = "retain_auto.jsonl"
"""In a run's folder: the rows."""
PROMPTS = Path(__file__).with_name("neutral_prompts.jsonl")
LONGEST = 80
"""Tokens of an answer at most."""
FEWEST = 20
"""Rows below which a model's own answers are too few to keep it whole."""


def neutral_prompts(encoder: PromptTemplate, eval: EvalOptions) -> StartAnswers:
    """Greedy answers to the neutral prompts, as an evaluation."""
    questions = [row["question"] for row in load_jsonl(str(PROMPTS), ["question"])]
    return StartAnswers("neutral", questions, encoder, eval, LONGEST)


def keep_answers(
    rows: Sequence[Mapping[str, Any]], forget: Collection[str], encoder: PromptTemplate
) -> list[dict[str, str]]:
    """Generated answers as retain rows, but for blank ones, too long rows, and answers that hold a forget answer.

    An answer that was cut at its largest length ends with its last whole sentence.

    Args:
        rows: With `question` and `generation`.
        forget: Answers to forget.
        encoder: Of the prompts.
    """
    secret, unlimited = {answer.strip().casefold() for answer in forget}, replace(encoder, max_length=None)
    kept = []
    for row in rows:
        question, answer = row["question"], row["generation"]
        if not answer or any(known in answer.casefold() for known in secret):
            continue
        tokens = unlimited.encode(question, answer)
        if encoder.max_length is None or len(tokens.input_ids) <= encoder.max_length:
            whole = (
                re.match(r".*[.!?](?=\s)", answer, flags=re.DOTALL)
                if tokens.length >= at_most(LONGEST, encoder)
                else None
            )
            kept.append({"question": question, "answer": whole[0] if whole else answer})
    if len(kept) < FEWEST:
        raise UserError(
            f"--data.retain auto: the start model gives only {len(kept)} of {len(rows)} neutral prompts an answer that "
            "can be kept; give --data.retain FILE with rows to keep"
        )
    return kept
