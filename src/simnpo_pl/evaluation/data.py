"""Data modules of an evaluation: the base of all, and one for losses under a reference model."""

import math
from collections.abc import Collection, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Split, eval_loader, largest_id
from simnpo_pl.utils.errors import UserError


class EvalData(pl.LightningDataModule):
    """What an evaluation measures, in batches.

    Args:
        eval: How much of it, and how much at once.
        evaluation: Splits and metrics; None where a subclass makes them.
    """

    end_ids: Collection[int] = ()
    """Tokens that end an answer."""

    def __init__(self, eval: EvalOptions, evaluation: Evaluation | None = None) -> None:
        super().__init__()
        self.eval = eval
        self._evaluation = evaluation

    def evaluation(self) -> Evaluation:
        assert self._evaluation is not None
        return self._evaluation

    def largest_id(self) -> int:
        """Largest token id that is read."""
        return largest_id(self.evaluation().splits)

    def val_dataloader(self) -> DataLoader:
        """Batches to score and to generate, each process its share."""
        return eval_loader(self.trainer, self.evaluation().splits, self.eval)

    test_dataloader = val_dataloader

    def predict_dataloader(self) -> DataLoader:
        """Prompts to generate."""
        return eval_loader(self.trainer, self.evaluation().splits, self.eval, scored=False)


class AnswerLosses(EvalData):
    """Replaces a benchmark in the reference attack: only the first answer of each row of these splits is scored."""

    def __init__(self, splits: Sequence[Split], eval: EvalOptions) -> None:
        answers = [Split(split.name, split.texts, [rows[:1] for rows in split.answers], {}) for split in splits]
        super().__init__(eval, Evaluation(answers, {}, {}, str))

    def losses(self, result: EvalResult) -> dict[str, Tensor]:
        """Losses by split in row order, nats per token, float64; NaN for rows that a limited evaluation left out.

        Raises:
            UserError: A loss is not finite.
        """
        splits = self.evaluation().splits
        losses = {split.name: torch.full((len(split.texts),), torch.nan, dtype=torch.float64) for split in splits}
        for row in result.rows:
            value = row["answer_nll"]
            if value is None or not math.isfinite(value):
                raise UserError(
                    f"--eval.mia_reference: the model's loss on {row['split']} row {row['index']} is not finite; "
                    "give another model"
                )
            losses[row["split"]][row["index"]] = value
        return losses
