"""Evaluation: truth ratios and greedy answers, by the public recipe and by the package."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.evaluation.plan import Generation, Split, generation_batches, scoring_batches
from simnpo_pl.evaluation.scoring import score_rows
from simnpo_pl.models.generation import generate, most_probable
from simnpo_pl.models.logprobs import Scorer

TOKENS, PROMPTS = 2048, 48
"""Defaults of `--eval.tokens_per_batch` and `--eval.prompts_per_batch`."""


class Losses:
    """Mean loss of every answer of every question, by the package's plan.

    Args:
        model: Scored.
        questions: Rows of each question's answers; equally many for every question.
    """

    def __init__(self, model: Any, questions: list[list[TokenRow]]) -> None:
        self.scorer = Scorer(model.eval())
        self.splits = [Split("forget", [{} for _ in questions], questions, {})]

    def __call__(self, tokens: int = TOKENS) -> list[list[float]]:
        """Plan and score; `[question][answer]` nats per token."""
        answers = self.splits[0].answers
        losses = np.full((len(answers), len(answers[0])), np.nan)
        for batch in scoring_batches(self.splits, tokens, 0):
            with torch.no_grad():
                scores = score_rows(self.scorer({"rows": batch})["rows"], batch["end"])
            losses[batch["index"], batch["kind"]] = scores["nll"]
        return losses.tolist()


class Answers:
    """Greedy answers by the package's plan, in the order of the prompts.

    Args:
        model: Generates.
        prompts: Token ids.
        lengths: Tokens of each answer: an untrained model has learnt no end.
        eos: Id that ends an answer.
    """

    def __init__(self, model: Any, prompts: list[list[int]], lengths: Sequence[int], eos: int) -> None:
        self.model, self.eos, self.lengths = model.eval(), eos, torch.tensor(lengths)
        self.splits = [Split("forget", [{} for _ in prompts], [], {}, Generation(prompts, max(lengths) + 1))]

    def __call__(self, at_once: int = PROMPTS) -> list[list[int]]:
        """Plan and generate."""
        answers: list[list[int]] = [[] for _ in self.lengths]
        for batch in generation_batches(self.splits, at_once):
            ends = partial(self._choose, self.lengths[batch["index"]])
            found = generate(self.model, batch["prompts"], batch["max_new_tokens"], [self.eos], ends)
            for index, answer in zip(batch["index"].tolist(), found, strict=True):
                answers[index] = answer
        return answers

    def _choose(self, lengths: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        logits[:, self.eos] = torch.where(step >= lengths[rows], torch.inf, -torch.inf)
        return most_probable(logits, rows, step)
