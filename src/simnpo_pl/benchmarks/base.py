"""The data module every benchmark builds on: training pairs from forget and retain rows, and an evaluation.

A benchmark is a subclass that says which rows are trained on and what is measured; it knows no model.
"""

from abc import abstractmethod
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import ConcatDataset, DataLoader

from simnpo_pl.data.pairing import PairedSampler
from simnpo_pl.data.sources import hub_file
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import CHAT_DATE_STRING, PromptTemplate, TokenRow
from simnpo_pl.data.training import TrainingLoader, TrainingRows, TrainingSet, scoring_parts
from simnpo_pl.errors import UserError
from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import EvalBatches, generation_batches, scoring_batches
from simnpo_pl.metrics.logs import RetainLog, parse_rows, read_retain_log
from simnpo_pl.models import context_length, load_tokenizer


class UnlearningData(pl.LightningDataModule):
    """Pairs of forget and retain rows, and what is measured.

    An epoch is one pass over the forget rows; each is paired with a retain row drawn afresh every epoch.

    Args:
        model: Hub id or folder of the model, for its tokenizer and longest sequence; the command line takes it from
            `--model.name`.
        tokenizer: Hub id or folder of the tokenizer; null takes the model's own.
        template: Prompt with `{question}` and `{answer}`; null takes the tokenizer's chat template where it has one,
            else "Question: {question}\\nAnswer: {answer}".
        system_prompt: System message, where the chat template is used; null for that template's own.
        chat_date: Date that chat templates write into the prompt, such as "26 Jul 2024"; fixed, so that results
            do not change by day.
        max_length: Longest sequence, tokens; null takes the limit of tokenizer and model.
        truncate: Whether longer sequences are cut at the end of the answer instead of being refused.
        effective_batch: Forget rows per optimizer step, over all devices; as many retain rows come with them.
        per_device_batch: Forget rows per forward pass on one device, at most.
        forget_rows: Rows the objective is applied to, by their place in the forget set from 0; null for all.
        seed: Seed of order, retain partners and refusals; the command line takes it from `--seed_everything`.
        eval: What is measured; the command line takes it from `--eval`.
    """

    def __init__(
        self,
        model: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        system_prompt: str | None = None,
        chat_date: str = CHAT_DATE_STRING,
        max_length: int | None = None,
        truncate: bool = False,
        effective_batch: int = 32,
        per_device_batch: int = 8,
        forget_rows: list[int] | None = None,
        seed: int = 0,
        eval: EvalOptions | None = None,
    ) -> None:
        super().__init__()
        self.model_name = model
        self.tokenizer_name = tokenizer or model
        self.template = template
        self.system_prompt = system_prompt
        self.chat_date = chat_date
        self.max_length = max_length
        self.truncate = truncate
        self.effective_batch = effective_batch
        self.per_device_batch = per_device_batch
        self.forget_rows = forget_rows
        self.seed = int(seed)
        self.eval = eval or EvalOptions()
        self._training: dict[str, list[TokenRow]] = {}
        self._evaluation: Evaluation | None = None
        self.retrained_log: RetainLog | None = None
        self.parts: tuple[str, ...] | None = None

    # -- what a benchmark says ---------------------------------------------------------------------------

    @abstractmethod
    def training_rows(self) -> TrainingRows:
        """The rows to train on.

        Raises:
            UserError: The data is missing or not usable.
        """

    @abstractmethod
    def build_evaluation(self, encode: PromptTemplate) -> Evaluation:
        """The splits and metrics to measure.

        Raises:
            UserError: The data is missing or not usable.
        """

    def export(self, result: EvalResult) -> dict[str, Any]:
        """Further result files of this benchmark: file name to JSON content."""
        return {}

    # -- tokens ------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs."""
        self._setup_encoder()
        if stage == "fit":
            self._setup_training()
            self._share_effective_batch()
        self.evaluation()

    def _setup_encoder(self) -> None:
        if hasattr(self, "encoder"):
            return
        if self.tokenizer_name is None:
            raise UserError("no tokenizer: give --model.name, or model= to the data module in Python")
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        self.encoder = PromptTemplate(
            self.tokenizer,
            self.template,
            self.max_length or self.context(),
            self.truncate,
            system_prompt=self.system_prompt,
            date=self.chat_date,
        )

    def context(self) -> int | None:
        """The shorter of the tokenizer's and the model's limit, tokens; None where neither has one."""
        name = self.model_name or self.tokenizer_name
        limits = [self.tokenizer.model_max_length, None if name is None else context_length(name)]
        # Tokenizers without a limit report an astronomical one.
        return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)

    @property
    def pad_id(self) -> int:
        """Any id of the vocabulary; padding is masked by length, never recognised by its id."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_id

    @property
    def eos_id(self) -> int:
        """End-of-sequence id."""
        return int(self.tokenizer.eos_token_id)

    @property
    def train_rows(self) -> int:
        """Number of rows the objective is applied to."""
        return len(self._training["forget"])

    @property
    def wanted_parts(self) -> tuple[str, ...]:
        """Parts the module's losses need of a training batch."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return self.parts if self.parts is not None else getattr(module, "parts", ("forget", "retain"))

    def _setup_training(self) -> None:
        if not self._training:
            rows = self.training_rows()
            chosen = rows if self.forget_rows is None else rows.only(self.forget_rows)
            self._form = chosen.form(self.encoder)
            self._training = chosen.encode(self.encoder, self.wanted_parts, self.seed)

    def forget_lengths(self) -> list[int]:
        """Scored tokens of each of the rows that `forget_rows` chooses from.

        Raises:
            UserError: The rows are text cut in blocks, which belong to no row.
        """
        self._setup_encoder()
        rows = self.training_rows()
        if isinstance(rows.forget, Texts) and rows.forget.rows == "blocks":
            raise UserError("rows to forget have no length of their own where their text is cut in blocks")
        return [row.length for row in rows.encode(self.encoder, ("forget",), self.seed)["forget"]]

    def _share_effective_batch(self) -> None:
        trainer = self.trainer
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

    def describe(self) -> str:
        """Rows, effective batch and steps in one line."""
        sampler, world = self.sampler, self.sampler.world_size
        sizes = ", ".join(f"{len(rows)} {name} rows" for name, rows in self._training.items())
        return (
            f"data: {sizes}; effective batch {self.effective_batch} = {world} device{'s' if world > 1 else ''} x "
            f"{self.per_device_batch} rows x {sampler.accumulate}; {sampler.steps_per_epoch} steps per epoch; "
            f"{self._form}"
        )

    # -- loaders -----------------------------------------------------------------------------------------

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

    def use_retrained_rows(self, rows: list[dict[str, Any]], source: str) -> None:
        """Compare with a retrained model's rows, as `EvalResult.rows` holds them."""
        self.retrained_log = parse_rows(source, rows)
        self._evaluation = None

    def find_retain_log(self) -> RetainLog | None:
        """The retrained model's rows: handed over, or read from `--eval.retain_log`."""
        if self.retrained_log is None and self.eval.retain_log is not None:
            self.retrained_log = read_retain_log(hub_file(self.eval.retain_log))
        return self.retrained_log

    def evaluation(self) -> Evaluation:
        """The splits and metrics, built once."""
        if self._evaluation is None:
            built = self.build_evaluation(self.encoder)
            self._evaluation = built if self.eval.splits is None else built.only(self.eval.splits)
        return self._evaluation

    def val_dataloader(self) -> DataLoader:
        """Batches to score and to generate, each process its share."""
        sets = self.evaluation().sets
        scored = scoring_batches(sets, self.eval.tokens_per_batch, self.pad_id)
        return self._eval_loader(scored, generation_batches(sets, self.eval.prompts_per_batch))

    def test_dataloader(self) -> DataLoader:
        """The same as in validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader:
        """Prompts to generate."""
        return self._eval_loader(generation_batches(self.evaluation().sets, self.eval.prompts_per_batch))

    def _eval_loader(self, *kinds: list[dict[str, Any]]) -> DataLoader:
        assert self.trainer is not None
        shares: list[EvalBatches] = []
        first = 0
        for batches in kinds:
            if batches:
                shares.append(EvalBatches(batches, self.trainer.global_rank, self.trainer.world_size, first))
                first += len(batches)
        return DataLoader(ConcatDataset(shares), batch_size=None)
