"""The losses of some answers under another model: what the reference attack compares with."""

import math
from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import EvalSet, eval_loader, largest_id, scoring_batches
from simnpo_pl.utils.errors import UserError


class AnswerLosses(pl.LightningDataModule):
    """Scores the answers of some splits and nothing else; takes the place of a benchmark in an evaluation.

    Args:
        sets: The splits; of each row the first answer is scored.
        eval: Options of the evaluation.
        pad_id: Token id that fills rows up.
    """

    end_ids = frozenset[int]()
    """Nothing is generated."""

    def __init__(self, sets: Sequence[EvalSet], eval: EvalOptions, pad_id: int) -> None:
        super().__init__()
        self.eval, self.pad_id = eval, pad_id
        answers = [EvalSet(part.name, part.texts, [rows[:1] for rows in part.answers], {}) for part in sets]
        self._evaluation = Evaluation(answers, {}, {}, str)

    def evaluation(self) -> Evaluation:
        """The splits, without metrics."""
        return self._evaluation

    def largest_id(self) -> int:
        """Largest token id that is read."""
        return largest_id(self._evaluation.sets)

    def val_dataloader(self) -> DataLoader:
        """Batches to score, each process its share."""
        batches = scoring_batches(self._evaluation.sets, self.eval.tokens_per_batch, self.pad_id)
        return eval_loader(self.trainer, batches)

    def losses(self, result: EvalResult) -> dict[str, Tensor]:
        """Losses by split in row order, nats per token, float64; NaN for rows that a limited evaluation left out.

        Raises:
            UserError: A loss is not finite.
        """
        sets = self._evaluation.sets
        losses = {part.name: torch.full((len(part.texts),), torch.nan, dtype=torch.float64) for part in sets}
        for row in result.rows:
            value = row["answer_nll"]
            if value is None or not math.isfinite(value):
                raise UserError(
                    f"--eval.mia_reference: the model's loss on {row['split']} row {row['index']} is not finite; "
                    "give another model"
                )
            losses[row["split"]][row["index"]] = value
        return losses
