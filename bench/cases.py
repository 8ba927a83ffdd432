"""Sizes of model and batch to measure at."""

from dataclasses import dataclass
from typing import Any

from bench.data import Batch, Rows, batch_of, freeze, model_of
from bench.step import Step, Variant


@dataclass(frozen=True)
class Case:
    """A model's shape and the rows of one step.

    Args:
        vocabulary: Tokens.
        width: Hidden dimensions.
        layers: Layers.
        batch: Forget rows; as many retain rows come with them.
        answer: Scored tokens of every row; 0 for TOFU's lengths.
        prompt: Tokens before them, where `answer` is given.
        data: Folder with TOFU's files; None for random tokens.
        tokenizer: Folder of the tokenizer for them.
    """

    vocabulary: int = 49152
    width: int = 512
    layers: int = 8
    batch: int = 8
    answer: int = 0
    prompt: int = 24
    data: str | None = None
    tokenizer: str | None = None

    def model(self) -> Any:
        """The untrained model."""
        return model_of(self.vocabulary, self.width, self.layers)

    def rows(self) -> tuple[Batch, Batch]:
        """Forget and retain rows."""
        rows = Rows(self.vocabulary, self.data, self.tokenizer)
        if self.answer:
            drawn = rows.of_length(self.answer, self.prompt, 2 * self.batch)
        else:
            drawn = rows.training(2 * self.batch)
        return batch_of(drawn[: self.batch]), batch_of(drawn[self.batch :])

    def step(self, variant: Variant) -> Step:
        """A variant's step, with nothing else in memory."""
        reference = freeze(self.model()) if variant.holds_reference else None
        return Step(variant, self.model(), reference, *self.rows())
