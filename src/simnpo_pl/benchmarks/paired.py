"""Pairs of forget and retain rows in tokens, an evaluation, and their loaders: what is common to every benchmark.

It knows no text and no tokenizer, and no model.
"""

import math
from abc import abstractmethod
from collections.abc import Collection
from statistics import fmean, pstdev
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from simnpo_pl.data.pairing import PairedSampler
from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import TrainingLoader, TrainingSet, scoring_parts
from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import eval_loader, generation_batches, gradient_batches, scoring_batches
from simnpo_pl.metrics.logs import RetainLog
from simnpo_pl.utils.errors import UserError


class PairedData(pl.LightningDataModule):
    """Pairs of forget and retain rows, and what is measured.

    An epoch is one pass over the forget rows; each is paired with a retain row drawn afresh every epoch.

    Args:
        effective_batch: Forget rows per optimizer step, over all devices; as many retain rows come with them.
        per_device_batch: Forget rows per forward pass on one device, at most.
        seed: Seed of order, retain partners and refusals; the command line takes it from `--seed_everything`.
        eval: What is measured; the command line takes it from `--eval`.
    """

    tokenizer: Any = None
    """Saved with the model; None where rows are tokens from the start."""

    def __init__(
        self,
        effective_batch: int = 32,
        per_device_batch: int = 8,
        seed: int = 0,
        eval: EvalOptions | None = None,
    ) -> None:
        super().__init__()
        self.effective_batch = effective_batch
        self.per_device_batch = per_device_batch
        self.seed = int(seed)
        self.eval = eval or EvalOptions()
        self._training: dict[str, list[TokenRow]] = {}
        self._evaluation: Evaluation | None = None
        self.parts: tuple[str, ...] | None = None

    # -- what a benchmark says ---------------------------------------------------------------------------

    @abstractmethod
    def token_rows(self, parts: tuple[str, ...]) -> dict[str, list[TokenRow]]:
        """The rows to train on.

        Args:
            parts: What the losses need: `forget`, `retain`, `alternate`.

        Returns:
            Part to its rows; alternates are one for each forget row.

        Raises:
            UserError: The data is missing or not usable.
        """

    @abstractmethod
    def make_evaluation(self) -> Evaluation:
        """The splits and metrics to measure.

        Raises:
            UserError: The data is missing or not usable.
        """

    def use_retrained_rows(self, rows: list[dict[str, Any]], source: str) -> None:
        """Compare with a retrained model's rows, as `EvalResult.rows` holds them; nothing where no metric does."""

    def find_retain_log(self) -> RetainLog | None:
        """The retrained model's rows that metrics compare with; None where none does."""
        return None

    def export(self, result: EvalResult) -> dict[str, Any]:
        """Further result files of this benchmark: file name to JSON content."""
        return {}

    def largest_id(self) -> int:
        """Largest token id that training and evaluation read."""
        rows = [row.input_ids for part in self._training.values() for row in part]
        for split in self.evaluation().splits:
            rows += [row.input_ids for answers in split.answers for row in answers]
            rows += split.generation.prompts if split.generation is not None else []
        return max((max(ids) for ids in rows if ids), default=0)

    # -- training ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read what the stage needs."""
        if stage == "fit":
            if not self._training:
                self._training = self.token_rows(self.wanted_parts)
            self._share_effective_batch()
        self.evaluation()

    @property
    def pad_id(self) -> int:
        """Any id of the vocabulary; padding is masked by length, never recognised by its id."""
        return 0

    @property
    def end_ids(self) -> Collection[int]:
        """Tokens that end an answer; empty where nothing is generated."""
        return ()

    @property
    def train_rows(self) -> int:
        """Number of rows the objective is applied to."""
        return len(self._training["forget"])

    @property
    def wanted_parts(self) -> tuple[str, ...]:
        """Parts the module's losses need of a training batch."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return self.parts if self.parts is not None else getattr(module, "parts", ("forget", "retain"))

    def _share_effective_batch(self) -> None:
        trainer: Any = self.trainer
        assert trainer is not None
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise UserError(
                "rows are shared among processes by this data module: set --trainer.use_distributed_sampler false"
            )
        self.sampler = PairedSampler(
            len(self._training["forget"]),
            len(self._training.get("retain", ())),
            self.effective_batch,
            self.per_device_batch,
            trainer.world_size,
            trainer.global_rank,
            self.seed,
        )
        if trainer.accumulate_grad_batches not in (1, self.sampler.accumulate):
            raise UserError(
                f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} contradicts "
                f"--data.effective_batch {self.effective_batch} = {trainer.world_size} device(s) x "
                f"{self.per_device_batch} rows x {self.sampler.accumulate}: leave it out"
            )
        trainer.accumulate_grad_batches = self.sampler.accumulate
        if trainer.overfit_batches:
            raise UserError(
                "--trainer.overfit_batches is not supported, since every epoch draws its batches anew: train on fewer "
                "forget rows, or set --trainer.limit_train_batches"
            )
        limit, whole, step = trainer.limit_train_batches, len(self.sampler), self.sampler.accumulate
        batches = limit if isinstance(limit, int) else int(limit * whole)
        if batches < whole and batches % step and not trainer.fast_dev_run:
            raise UserError(
                f"--trainer.limit_train_batches {limit} ends an epoch inside an optimizer step of {step} "
                f"micro-batches: give a multiple of {step}"
            )

    def describe(self) -> str:
        """Rows, effective batch and steps in one line."""
        sampler, world = self.sampler, self.sampler.world_size
        sizes = ", ".join(f"{len(rows)} {name} rows" for name, rows in self._training.items())
        return (
            f"data: {sizes}; effective batch {self.effective_batch} = {world} device{'s' if world > 1 else ''} x "
            f"{self.per_device_batch} rows x {sampler.accumulate}; {sampler.steps_per_epoch} steps per epoch"
        )

    def micro_batch(self) -> tuple[int, int]:
        """Rows of a forward pass on one device, and tokens in each, so that hardly any micro-batch has more in all."""
        rows, tokens = 0, 0.0
        for part in self._training.values():
            lengths, size = [len(row.input_ids) for row in part], min(self.per_device_batch, len(part))
            tokens += min(size * max(lengths), size * fmean(lengths) + 3 * math.sqrt(size) * pstdev(lengths))
            rows += size
        return rows, math.ceil(tokens / rows)

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this process, see `TrainingSet`."""
        return TrainingLoader(TrainingSet(self._training, self.pad_id), self.sampler)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands."""
        return self.sampler.state_dict() if hasattr(self, "sampler") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of an epoch; Lightning restores a loader too late, once it has been set up."""
        if hasattr(self, "sampler"):
            self.sampler.load_state_dict(state_dict)

    def scoring_parts(self, parts: list[str]) -> list[dict[str, Any]]:
        """All forget rows (and their refusals) once, for the reference's log-probs."""
        return [batch for name in parts for batch in scoring_parts(self._training[name], name, self.pad_id)]

    # -- evaluation --------------------------------------------------------------------------------------

    def evaluation(self) -> Evaluation:
        """The splits and metrics, built once."""
        if self._evaluation is None:
            self._evaluation = self.make_evaluation().configure(self.eval, self.seed)
        return self._evaluation

    def val_dataloader(self) -> DataLoader:
        """Batches to score and to generate, each process its share."""
        splits = self.evaluation().splits
        return eval_loader(
            self.trainer,
            scoring_batches(splits, self.eval.tokens_per_batch, self.pad_id),
            gradient_batches(splits, self.pad_id),
            generation_batches(splits, self.eval.prompts_per_batch),
        )

    def test_dataloader(self) -> DataLoader:
        """The same as in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Prompts to generate."""
        return eval_loader(self.trainer, generation_batches(self.evaluation().splits, self.eval.prompts_per_batch))
