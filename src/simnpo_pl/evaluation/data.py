"""Data modules of an evaluation alone, such as that of a reference model's losses."""

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


class EvaluationData(pl.LightningDataModule):
    """Replaces a benchmark in an evaluation."""

    def __init__(
        self, evaluation: Evaluation, eval: EvalOptions, pad_id: int = 0, end_ids: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.eval, self.pad_id, self.end_ids = eval, pad_id, end_ids
        self._evaluation = evaluation

    def evaluation(self) -> Evaluation:
        return self._evaluation

    def largest_id(self) -> int:
        """Largest token id that is read."""
        return largest_id(self._evaluation.splits)

    def val_dataloader(self) -> DataLoader:
        return eval_loader(self.trainer, self._evaluation.splits, self.eval, self.pad_id)

    predict_dataloader = val_dataloader


def first_answers(splits: Sequence[Split]) -> Evaluation:
    """Scores the first answer of each row of these splits, for the reference attack."""
    answers = [Split(split.name, split.texts, [rows[:1] for rows in split.answers], {}) for split in splits]
    return Evaluation(answers, {}, {}, str)


def reference_losses(splits: Sequence[Split], result: EvalResult) -> dict[str, Tensor]:
    """Losses by split in row order, nats per token, float64; NaN for rows that a limited evaluation left out.

    Raises:
        UserError: A loss is not finite.
    """
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
