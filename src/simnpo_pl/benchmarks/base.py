"""The data module of benchmarks made of text: training pairs from forget and retain rows, and an evaluation.

A benchmark is a subclass that says which rows are trained on and what is measured; it knows no model.
"""

from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.benchmarks.paired import PairedData
from simnpo_pl.data.conversation import AnswerEnd
from simnpo_pl.data.sources import hub_file
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import CHAT_DATE_STRING, PromptTemplate, TokenRow
from simnpo_pl.data.training import TrainingRows
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.metrics.logs import RetainLog, parse_rows, read_retain_log, unlearning_run
from simnpo_pl.models.loading import context_length, load_tokenizer
from simnpo_pl.utils.errors import UserError


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
        forget_rows: Rows the objective is applied to, by their place in the forget set from 0; null for all.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model_name = model
        self.tokenizer_name = tokenizer or model
        self.template = template
        self.system_prompt = system_prompt
        self.chat_date = chat_date
        self.chat_template_kwargs = chat_template_kwargs
        self.answer_end = answer_end
        self.max_length = max_length
        self.truncate = truncate
        self.forget_rows = forget_rows
        self.retrained_log: RetainLog | None = None
        self.reference_losses: dict[str, Tensor] | None = None

    # -- what a benchmark says ---------------------------------------------------------------------------

    @abstractmethod
    def training_rows(self) -> TrainingRows:
        """The rows to train on.

        Raises:
            UserError: The data is missing or not usable.
        """

    @abstractmethod
    def build_evaluation(self, build: EvaluationBuilder) -> None:
        """Adds the splits and metrics to measure.

        Raises:
            UserError: The data is missing or not usable.
        """

    # -- tokens ------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs."""
        self._setup_encoder()
        super().setup(stage)

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
            answer_end=self.answer_end,
            chat_template_kwargs=self.chat_template_kwargs,
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
        known = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if known is None else known)

    @property
    def end_ids(self) -> Collection[int]:
        """Tokens that end an answer, known once the answers are tokens."""
        return self.encoder.end_ids

    def token_rows(self, parts: tuple[str, ...]) -> dict[str, list[TokenRow]]:
        """The rows to train on, in tokens."""
        rows = self.training_rows()
        chosen = rows if self.forget_rows is None else rows.only(self.forget_rows)
        self._form = chosen.form(self.encoder)
        return chosen.encode(self.encoder, parts, self.seed)

    def make_evaluation(self) -> Evaluation:
        """The splits and metrics to measure."""
        build = EvaluationBuilder(self.encoder, self.eval)
        self.build_evaluation(build)
        return build.evaluation()

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

    def describe(self) -> str:
        """Rows, effective batch, steps and form of the rows in one line."""
        return f"{super().describe()}; {self._form}"

    # -- the retrained model -----------------------------------------------------------------------------

    def use_retrained_rows(self, rows: list[dict[str, Any]], source: str) -> None:
        """Compare with a retrained model's rows, as `EvalResult.rows` holds them."""
        self.retrained_log = parse_rows(source, rows, "evaluated in this run")
        self._evaluation = None

    def use_reference_losses(self, losses: dict[str, Tensor]) -> None:
        """Compare with a reference model's losses of the answers, by split in row order, nats per token."""
        self.reference_losses = losses
        self._evaluation = None

    def find_retain_log(self) -> RetainLog | None:
        """The retrained model's rows: handed over, or read from `--eval.retain_log`.

        Raises:
            UserError: The log cannot be read or used, or `--eval.retrained` is the model of a run that unlearned.
        """
        if self.eval.retrained is not None and (run := unlearning_run(Path(self.eval.retrained).expanduser().parent)):
            raise UserError(
                f"--eval.retrained {self.eval.retrained}: this model was unlearned in {run}; give one that was trained "
                "without the forget rows"
            )
        if self.retrained_log is None and self.eval.retain_log is not None:
            self.retrained_log = read_retain_log(hub_file(self.eval.retain_log))
        return self.retrained_log
