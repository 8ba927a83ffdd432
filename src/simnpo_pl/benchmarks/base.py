"""Data modules of all benchmarks: training pairs, an evaluation, and their loaders.

`PairedData` knows tokens alone, `UnlearningData` adds text and a tokenizer; neither knows a model. A benchmark is a
subclass that says which rows are trained on and what is measured. Of the module they need `parts`, the parts of a
batch that its losses read.
"""

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.benchmarks.answers import ALTERNATES, Answer, read_alternates, sample_alternates, write_rows
from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.conversation import AnswerEnd
from simnpo_pl.data.pairing import PairedSampler
from simnpo_pl.data.sources import hub_file
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import CHAT_DATE_STRING, PromptTemplate, TokenRow
from simnpo_pl.data.training import TrainingRows, TrainingSet, scoring_parts
from simnpo_pl.evaluation.data import EvalData
from simnpo_pl.evaluation.evaluation import EvalResult, Evaluation
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.metrics.logs import RetainLog, parse_rows, read_retain_log, unlearning_run
from simnpo_pl.models.loading import context_length, load_tokenizer
from simnpo_pl.utils.errors import UserError


class PairedData(EvalData):
    """Pairs of forget and retain rows, and what is measured.

    An epoch is one pass over the forget rows; each is paired with a retain row drawn anew every epoch.

    Args:
        effective_batch: Forget rows per optimizer step, over all devices; each comes with a retain row.
        per_device_batch: Largest number of forget rows in a forward pass on one device.
        seed: Seed of order, retain partners and refusals; the command line takes it from `--seed_everything`.
        eval: What is measured; the command line takes it from `--eval`.
    """

    sampler: PairedSampler | None = None
    tokenizer: Any = None
    """Saved with the model; None where rows are tokens from the start."""

    def __init__(
        self, effective_batch: int = 32, per_device_batch: int = 8, seed: int = 0, eval: EvalOptions | None = None
    ) -> None:
        super().__init__(eval or EvalOptions())
        self.effective_batch = effective_batch
        self.per_device_batch = per_device_batch
        self.seed = int(seed)
        self._training: dict[str, list[TokenRow]] = {}

    @abstractmethod
    def token_rows(self, parts: Collection[str]) -> dict[str, list[TokenRow]]:
        """The rows to train on.

        Args:
            parts: What the losses read: `forget`, `retain`, `alternate`, `sampled`.

        Returns:
            Part to its rows; one alternate for each forget row.
        """

    @abstractmethod
    def make_evaluation(self) -> Evaluation:
        """The splits and metrics to measure; raises `UserError` where the data is not usable."""

    def make_rows(self, parts: Collection[str], folder: Path, answer: Answer) -> None:
        """Make training rows of these parts from what a start model answers, once for a run folder."""

    def use_retrained_rows(self, rows: list[dict[str, Any]], source: str) -> None:
        """Compare with a retrained model's rows, as `EvalResult.rows` holds them; ignored where no metric does."""

    def find_retain_log(self) -> RetainLog | None:
        """The retrained model's rows that metrics compare with; None where no metric does."""
        return None

    def export(self, result: EvalResult) -> dict[str, Any]:
        """Further result files of this benchmark: file name to JSON content."""
        return {}

    def train_on(self, rows: list[TokenRow]) -> None:
        """Train on these rows in the place of the forget rows."""
        self._training = {"forget": rows}

    def setup(self, stage: str) -> None:
        """Read what the stage needs."""
        if stage == "fit":
            trainer: Any = self.trainer
            self.load_training(trainer.lightning_module.parts)
        self.evaluation()

    def load_training(self, parts: Collection[str]) -> None:
        """Read the training rows of these parts, see `token_rows`, once, and cut them into effective batches."""
        trainer: Any = self.trainer
        self._training = self._training or self.token_rows(parts)
        self.sampler = PairedSampler(
            len(self._training["forget"]),
            len(self._training.get("retain", ())),
            self.effective_batch,
            self.per_device_batch,
            trainer.world_size,
            trainer.global_rank,
            self.seed,
        )
        _set_accumulation(trainer, self.sampler)

    def describe(self) -> str:
        """Rows, effective batch and steps in one line."""
        sampler = self.sampler
        assert sampler is not None
        world, steps = sampler.world_size, math.ceil(sampler.forget_rows / sampler.effective_batch)
        sizes = ", ".join(f"{len(rows)} {name} rows" for name, rows in self._training.items())
        return (
            f"data: {sizes}; effective batch {self.effective_batch} = {world} device{'s' if world > 1 else ''} x "
            f"{self.per_device_batch} rows x {sampler.accumulate}; {steps} steps per epoch"
        )

    def micro_batch(self) -> tuple[int, int]:
        """Rows of a forward pass on one device, and tokens per row that hardly any micro-batch exceeds on average."""
        rows, tokens = 0, 0.0
        for part in self._training.values():
            lengths, size = [len(row.input_ids) for row in part], min(self.per_device_batch, len(part))
            tokens += min(size * max(lengths), size * fmean(lengths) + 3 * math.sqrt(size) * pstdev(lengths))
            rows += size
        return rows, math.ceil(tokens / rows)

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this process, see `TrainingSet`."""
        assert self.sampler is not None
        loader: Any = DataLoader(TrainingSet(self._training), batch_size=None, sampler=self.sampler)
        # Having a state, it tells Lightning that it can resume in the middle of an epoch.
        loader.state_dict, loader.load_state_dict = self.sampler.state_dict, self.sampler.load_state_dict
        return loader

    def reference_batches(self, parts: Sequence[str]) -> list[dict[str, Any]]:
        """All forget rows (and their refusals) once, for the reference's log-probs."""
        return [batch for name in parts for batch in scoring_parts(self._training[name], name)]

    def state_dict(self) -> dict[str, Any]:
        """Progress in the epoch."""
        return {} if self.sampler is None else self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume in the middle of an epoch; Lightning restores a loader too late, once it has been set up."""
        if self.sampler is not None:
            self.sampler.load_state_dict(state_dict)

    def evaluation(self) -> Evaluation:
        """The splits and metrics, built once."""
        if self._evaluation is None:
            self._evaluation = self.make_evaluation().configure(self.eval, self.seed)
        return self._evaluation

    def largest_id(self) -> int:
        """Largest token id that training and evaluation read."""
        training = (max(row.input_ids, default=0) for part in self._training.values() for row in part)
        return max([super().largest_id(), *training])


class UnlearningData(PairedData):
    """Pairs of forget and retain rows of text, and what is measured.

    Args:
        model: Hub id or folder of the model, for its tokenizer and longest sequence; the command line takes it from
            `--model.name`.
        tokenizer: Hub id or folder of the tokenizer; null takes the model's own.
        template: Prompt with `{question}` and `{answer}`; null takes the tokenizer's chat template where it has one,
            else "Question: {question}\\nAnswer: {answer}".
        system_prompt: System message, where the chat template is used; null for that template's own.
        chat_date: Date that chat templates write into the prompt, such as "26 Jul 2024"; fixed, so that results
            do not change by day.
        chat_template_kwargs: Variables of the chat template, such as {"enable_thinking": false}.
        answer_end: What ends an answer and is scored with it, where the chat template is used: `turn` for what the
            template itself writes there; `eos` for the tokenizer's end-of-sequence token.
        max_length: Longest sequence, tokens; null takes the limit of tokenizer and model.
        truncate: Whether longer sequences are cut at the end of the answer instead of being refused.
        forget_rows: Rows the objective is applied to, by their index in the forget set from 0; null for all.
        alternates: For AltPO: how many other answers to each forget question the start model is asked for, or a file
            of them, see docs/methods.md.
        kwargs: Passed on to `PairedData`.
    """

    def __init__(
        self,
        model: str | None = None,
        tokenizer: str | None = None,
        template: str | None = None,
        system_prompt: str | None = None,
        chat_date: str = CHAT_DATE_STRING,
        chat_template_kwargs: dict[str, Any] | None = None,
        answer_end: AnswerEnd = "turn",
        max_length: int | None = None,
        truncate: bool = False,
        forget_rows: list[int] | None = None,
        alternates: int | str = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model
        self.tokenizer_name = tokenizer or model
        self.max_length = max_length
        self._template = partial(
            PromptTemplate,
            template=template,
            truncate=truncate,
            system_prompt=system_prompt,
            date=chat_date,
            answer_end=answer_end,
            chat_template_kwargs=chat_template_kwargs,
        )
        self.forget_rows = forget_rows
        self.alternates = alternates
        if isinstance(alternates, int) and alternates < 1:
            raise UserError(f"--data.alternates must be a file or a number of at least 1, got {alternates}")
        self.retrained_log: RetainLog | None = None
        self.reference_losses: dict[str, Tensor] | None = None

    @abstractmethod
    def training_rows(self, parts: Collection[str]) -> TrainingRows:
        """The rows to train on.

        Args:
            parts: What the losses read: `forget`, `retain`, `alternate`, `sampled`; other rows may be left out.
        """

    @abstractmethod
    def build_evaluation(self, build: EvaluationBuilder) -> None:
        """Adds the splits and metrics to measure; raises `UserError` where the data is not usable."""

    @cached_property
    def tokenizer(self) -> Any:
        if self.tokenizer_name is None:
            raise UserError("no tokenizer: give --model.name, or model= to the data module in Python")
        return load_tokenizer(self.tokenizer_name)

    @cached_property
    def encoder(self) -> PromptTemplate:
        return self._template(self.tokenizer, max_length=self.max_length or self.context())

    def context(self) -> int | None:
        """The shorter of the tokenizer's and the model's limit, tokens; None where neither has one."""
        name: Any = self.model_name or self.tokenizer_name
        limits = [self.tokenizer.model_max_length, context_length(name)]
        # Tokenizers without a limit report an astronomical one.
        return min((limit for limit in limits if limit is not None and limit < 10**9), default=None)

    @property
    def end_ids(self) -> Collection[int]:  # type: ignore[override]
        return self.encoder.end_ids

    def make_rows(self, parts: Collection[str], folder: Path, answer: Answer) -> None:
        if "sampled" in parts and isinstance(self.alternates, int):
            file, rows = folder / ALTERNATES, self.training_rows(("forget",)).forget
            if not file.is_file():
                made = sample_alternates(rows, self.alternates, self.encoder, self.eval, self.seed, answer)
                write_rows(self.trainer, file, made)
            self.alternates = str(file)

    def token_rows(self, parts: Collection[str]) -> dict[str, list[TokenRow]]:
        rows = self.training_rows(parts)
        if "sampled" in parts and isinstance(self.alternates, str):
            rows = replace(rows, sampled=read_alternates(self.alternates, rows.forget))
        chosen = rows if self.forget_rows is None else rows.only(self.forget_rows)
        self._form = f"prompt: {self.encoder.description}"
        if isinstance(chosen.forget, Texts):
            self._form = f"text, {chosen.forget.rows} of at most {self.encoder.max_length} tokens"
        return chosen.encode(self.encoder, parts, self.seed)

    def make_evaluation(self) -> Evaluation:
        build = EvaluationBuilder(self.encoder, self.eval)
        self.build_evaluation(build)
        return build.evaluation()

    def describe(self) -> str:
        return f"{super().describe()}; {self._form}"

    def use_retrained_rows(self, rows: list[dict[str, Any]], source: str) -> None:
        self.retrained_log = parse_rows(source, rows, "evaluated in this run", convention=self.eval.truth_ratio)
        self._evaluation = None

    def use_reference_losses(self, losses: dict[str, Tensor]) -> None:
        """Compare with a reference model's losses of the answers, by split in row order, nats per token."""
        self.reference_losses = losses
        self._evaluation = None

    def find_retain_log(self) -> RetainLog | None:
        """The retrained model's rows: handed over, or read from `--eval.retain_log`."""
        if self.eval.retrained is not None and (run := unlearning_run(Path(self.eval.retrained).expanduser().parent)):
            raise UserError(
                f"--eval.retrained {self.eval.retrained}: this model was unlearned in {run}; give one that was trained "
                "without the forget rows"
            )
        if self.retrained_log is None and self.eval.retain_log is not None:
            self.retrained_log = read_retain_log(hub_file(self.eval.retain_log), self.eval.truth_ratio)
        return self.retrained_log


def _set_accumulation(trainer: Any, sampler: PairedSampler) -> None:
    """Let the Trainer accumulate the micro-batches of an optimizer step; refuse its settings that contradict them."""
    step = sampler.accumulate
    # Lightning has no public name for this setting.
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise UserError("this data module distributes rows to processes: set --trainer.use_distributed_sampler false")
    if trainer.accumulate_grad_batches not in (1, step):
        raise UserError(
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} contradicts "
            f"--data.effective_batch {sampler.effective_batch} = {trainer.world_size} device(s) x "
            f"{sampler.per_device_batch} rows x {step}: leave it out"
        )
    trainer.accumulate_grad_batches = step
    if trainer.overfit_batches:
        raise UserError(
            "--trainer.overfit_batches is not supported, since every epoch draws its batches anew: train on fewer "
            "forget rows, or set --trainer.limit_train_batches"
        )
    limit, total = trainer.limit_train_batches, len(sampler)
    batches = limit if isinstance(limit, int) else int(limit * total)
    if batches < total and batches % step and not trainer.fast_dev_run:
        raise UserError(
            f"--trainer.limit_train_batches {limit} ends an epoch inside an optimizer step of {step} "
            f"micro-batches: give a multiple of {step}"
        )
