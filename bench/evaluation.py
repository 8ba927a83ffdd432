"""Evaluation: truth ratios and greedy answers, by the public recipe and by the package."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.evaluation.plan import EvalSet, Generation, generation_batches, scoring_batches
from simnpo_pl.evaluation.scoring import Scoring, score_rows
from simnpo_pl.generation import greedy
from simnpo_pl.logprobs import Scorer

TOKENS, PROMPTS = 2048, 48
"""Defaults of `--eval.tokens_per_batch` and `--eval.prompts_per_batch`."""
ANSWER_TOKENS = 35
"""Mean length of an answer of TOFU."""


class Losses:
    """Mean loss of every answer of every question, by the package's plan.

    Args:
        model: Scored.
        questions: Rows of each question's answers; equally many for every question.
    """

    def __init__(self, model: Any, questions: list[list[TokenRow]]) -> None:
        self.scorer = Scorer(model.eval())
        self.sets = [EvalSet("forget", [{} for _ in questions], questions, {})]

    def __call__(self, tokens: int = TOKENS) -> list[list[float]]:
        """Plan and score; `[question][answer]` nats per token."""
        answers = self.sets[0].answers
        losses = np.full((len(answers), len(answers[0])), np.nan)
        for batch in scoring_batches(self.sets, tokens, 0):
            with torch.no_grad():
                scores = score_rows(self.scorer({"rows": batch})["rows"], Scoring())
            losses[batch["index"], batch["kind"]] = scores["nll"]
        return losses.tolist()


class Answers:
    """Greedy answers by the package's plan, in the order of the prompts.

    Args:
        model: Generates.
        prompts: Token ids.
        max_new_tokens: Generated tokens at most.
        eos: An answer ends before the first of these ids.
    """

    def __init__(self, model: Any, prompts: list[list[int]], max_new_tokens: int, eos: Sequence[int]) -> None:
        self.model, self.eos = model.eval(), eos
        self.sets = [EvalSet("forget", [{} for _ in prompts], [], {}, Generation(prompts, max_new_tokens))]

    def __call__(self, at_once: int = PROMPTS) -> list[list[int]]:
        """Plan and generate."""
        assert self.sets[0].generation is not None
        answers: list[list[int]] = [[] for _ in self.sets[0].generation.prompts]
        for batch in generation_batches(self.sets, at_once):
            found = greedy(self.model, batch["prompts"], batch["max_new_tokens"], self.eos)
            for index, answer in zip(batch["index"].tolist(), found, strict=True):
                answers[index] = answer
        return answers


def ends(model: Any, prompts: list[list[int]], max_new_tokens: int, vocabulary: int) -> list[int]:
    """Ids that end answers so that these have TOFU's mean length: an untrained model has learnt no end.

    Of the ids in a fixed random order as many are taken as bring the mean length of the answers nearest to it.
    """
    free = Answers(model, prompts, max_new_tokens, [])()
    order = np.random.default_rng(0).permutation(vocabulary)
    place = np.empty(vocabulary, dtype=np.int64)
    place[order] = np.arange(vocabulary)
    rows = [place[np.array(row)] for row in free]

    def mean_length(count: int) -> float:
        return float(np.mean([np.argmax(row < count) if (row < count).any() else len(row) for row in rows]))

    counts = sorted({int(value) + 1 for row in rows for value in row})
    best = min(counts, key=lambda count: abs(mean_length(count) - ANSWER_TOKENS))
    return order[:best].tolist()
