"""Evaluation: truth ratios and greedy answers, by the public recipe and by the package."""

from collections.abc import Mapping
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
FORGET_SCORES = ("exact_memorization", "extraction_strength")


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
        for batch in scoring_batches(self.splits, tokens):
            with torch.no_grad():
                scores = score_rows(self.scorer({"rows": batch})["rows"], batch["end"])
            losses[batch["index"], batch["kind"]] = scores["nll"]
        return losses.tolist()


class Whole:
    """TOFU's evaluation by the package's plan: all splits together.

    Args:
        model: Evaluated.
        splits: Rows of each question's answers, by split.
        eos: Id that ends an answer.
        limit: Generated tokens at most.
    """

    def __init__(self, model: Any, splits: Mapping[str, list[list[TokenRow]]], eos: int, limit: int) -> None:
        self.model, self.eos, self.scorer = model, eos, Scorer(model)
        self.splits, self.lengths = [], []
        for name, questions in splits.items():
            made = Generation([answers[0].prompt_ids for answers in questions], limit + 1)
            self.splits.append(Split(name, [{} for _ in questions], questions, {}, made))
            self.lengths.append(torch.tensor([min(answers[0].length - 1, limit) for answers in questions]))

    def scores(self) -> dict[str, Any]:
        """Mean losses of every split's answers, and what else one pass gives of the forget rows."""
        found = {split.name: torch.zeros(len(split.answers), split.kinds) for split in self.splits}
        forget = {name: torch.zeros(len(self.splits[0].answers)) for name in FORGET_SCORES}
        for batch in scoring_batches(self.splits, TOKENS):
            with torch.no_grad():
                scores = score_rows(self.scorer({"rows": batch})["rows"], torch.ones_like(batch["end"]))
            for number, split in enumerate(self.splits):
                own = batch["split"] == number
                found[split.name][batch["index"][own], batch["kind"][own]] = scores["nll"][own]
            first = (batch["split"] == 0) & (batch["kind"] == 0)
            for name, values in forget.items():
                values[batch["index"][first]] = scores[name][first]
        return {name: values.tolist() for name, values in (found | forget).items()}

    def answers(self) -> dict[str, list[list[int]]]:
        """Greedy answers of given lengths, by split."""
        found: dict[str, list[list[int]]] = {split.name: [[]] * len(split.texts) for split in self.splits}
        for batch in generation_batches(self.splits, PROMPTS):
            places = list(zip(batch["split"].tolist(), batch["index"].tolist(), strict=True))
            ends = partial(ending, self.eos, torch.stack([self.lengths[number][index] for number, index in places]))
            answers = generate(self.model, batch["prompts"], batch["max_new_tokens"], [self.eos], ends)
            for (number, index), answer in zip(places, answers, strict=True):
                found[self.splits[number].name][index] = answer
        return found


def ending(eos: int, lengths: torch.Tensor, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    """The most probable token, which is the end after as many tokens as a row's length."""
    logits[:, eos] = torch.where(step >= lengths[rows], torch.inf, -torch.inf)
    return most_probable(logits, rows, step)
