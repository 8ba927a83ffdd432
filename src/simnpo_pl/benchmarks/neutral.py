"""Retain rows where the user has none: what the start model itself answers to neutral prompts."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from simnpo_pl.data.sources import load_jsonl
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Generation, Split, eval_loader, generation_batches, largest_id
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


class NeutralPrompts(pl.LightningDataModule):
    """Replaces a benchmark in an evaluation: greedy answers to the neutral prompts are generated, nothing is scored."""

    def __init__(self, encoder: PromptTemplate, eval: EvalOptions) -> None:
        super().__init__()
        self.eval, self.end_ids = eval, encoder.end_ids
        texts = load_jsonl(str(PROMPTS), ["question"])
        # Any word: a space before the answer belongs to its first token, and not to the prompt.
        encoded = encoder.encode_rows([(text["question"], "The") for text in texts], "neutral")
        prompts = [row.prompt_ids for row in encoded]
        generation = Generation(prompts, longest(encoder), encoder.finish, lambda text, answer: {})
        tokenizer: Any = encoder.tokenizer
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        rows = [{**text, "answer": ""} for text in texts]
        self._evaluation = Evaluation([Split("neutral", rows, [], {}, generation)], {}, {}, decode)

    def evaluation(self) -> Evaluation:
        return self._evaluation

    def largest_id(self) -> int:
        """Largest token id that is read."""
        return largest_id(self._evaluation.splits)

    def val_dataloader(self) -> DataLoader:
        _, prompts = self.eval.batch_sizes(self.trainer)
        return eval_loader(self.trainer, generation_batches(self._evaluation.splits, prompts))


def longest(encoder: PromptTemplate) -> int:
    """Tokens of an answer at most; half of short sequences is left to the prompt."""
    return min(LONGEST, (encoder.max_length or 2 * LONGEST) // 2)


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
            whole = re.match(r".*[.!?](?=\s)", answer, flags=re.DOTALL) if tokens.length >= longest(encoder) else None
            kept.append({"question": question, "answer": whole[0] if whole else answer})
    if len(kept) < FEWEST:
        raise UserError(
            f"--data.retain auto: the start model gives only {len(kept)} of {len(rows)} neutral prompts an answer that "
            "can be kept; give --data.retain FILE with rows to keep"
        )
    return kept
