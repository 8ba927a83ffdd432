"""Losses of answers under another model, for the reference attack."""

import math
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Split, eval_loader, largest_id, scoring_batches
from simnpo_pl.utils.errors import UserError


class AnswerLosses(pl.LightningDataModule):
    """Replaces a benchmark in an evaluation: only the first answer of each row of these splits is scored."""

    end_ids = frozenset[int]()

    def __init__(self, splits: Sequence[Split], eval: EvalOptions, pad_id: int) -> None:
        super().__init__()
        self.eval, self.pad_id = eval, pad_id
        answers = [Split(split.name, split.texts, [rows[:1] for rows in split.answers], {}) for split in splits]
        self._evaluation = Evaluation(answers, {}, {}, str)

    def evaluation(self) -> Evaluation:
        return self._evaluation

    def largest_id(self) -> int:
        """Largest token id that is read."""
        return largest_id(self._evaluation.splits)

    def val_dataloader(self) -> DataLoader:
        tokens, _ = self.eval.batch_sizes(self.trainer)
        return eval_loader(self.trainer, scoring_batches(self._evaluation.splits, tokens, self.pad_id))

    def losses(self, result: EvalResult) -> dict[str, Tensor]:
        """Losses by split in row order, nats per token, float64; NaN for rows that a limited evaluation left out.

        Raises:
            UserError: A loss is not finite.
        """
        splits = self._evaluation.splits
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
