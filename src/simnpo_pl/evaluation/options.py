"""What an evaluation measures and how much of it; the `--eval` group of the command line."""

from dataclasses import dataclass
from typing import Any, Literal

from simnpo_pl.utils.errors import UserError


@dataclass
class EvalOptions:
    """Options of the evaluation.

    Args:
        retain_log: Evaluation log of the retrained model, which forget quality and PrivLeak compare with: a run folder
            or its rows.jsonl, open-unlearning's TOFU_EVAL.json or MUSE_EVAL.json, or TOFU's eval_log_aggregated.json.
            A file in a hub data set is written hf://datasets/OWNER/NAME/PATH.
        retrained: Retrained model to evaluate instead of reading a log: hub id or folder.
        start: Whether `fit` evaluates the start model before training.
        final: Whether `fit` evaluates the exported model.
        max_new_tokens: Length of a generated answer at most, tokens.
        temperature: Of generated answers: 0 is greedy; above 0 each is sampled once, with draws that follow from
            `--seed_everything`, split and row.
        splits: Splits to measure, such as `forget`; null for all of the benchmark's.
        generate_rows: Rows of each split that are generated for ROUGE, from the first; 0 for none, null for all.
        metrics: Further metrics; null for none, else a list of entries with `class_path` (a subclass of `RowMetric`)
            and `split`; optionally with `name`, for the result SPLIT/NAME, and `init_args`.
        truth_ratio: Convention of the truth ratio; `geometric` is the one behind published tables.
        tokens_per_batch: Tokens scored in one forward pass at most; rows are sorted by length. Null: 2,048 on a CPU,
            whose cache is small, and 8,192 on a GPU.
        prompts_per_batch: Prompts generated together at most. Null: 48 on a CPU and 256 on a GPU, where a token of
            all takes hardly longer than a token of one.
        min_k: Share of an answer's tokens, the least likely ones, that the Min-K% attacks and PrivLeak average.
        mia_reference: Reference model of the reference attack: hub id or folder.
        depth: Whether `fit` measures the Unlearning Depth Score of the exported model, with hidden states of the start
            model and of the one that `retrained` names.
        gradnorm: Whether the gradient-norm attack is made: a backward pass for every forget and holdout row.
        fluency_classifier: Text classifier that rates the generated forget answers: hub id or folder.
        fluency_label: Its label of fluent text; the rating is that label's probability.
        cache_dir: Folder in which evaluations of start, retrained and reference models are kept for later runs; null
            keeps none. Commands that make several runs set it to a folder in their own.
    """

    retain_log: str | None = None
    retrained: str | None = None
    start: bool = True
    final: bool = True
    max_new_tokens: int = 200
    temperature: float = 0.0
    splits: list[str] | None = None
    generate_rows: int | None = None
    metrics: list[dict[str, Any]] | None = None
    truth_ratio: Literal["geometric", "arithmetic", "prob_mean"] = "geometric"
    tokens_per_batch: int | None = None
    prompts_per_batch: int | None = None
    min_k: float = 0.4
    mia_reference: str | None = None
    depth: bool = False
    gradnorm: bool = False
    fluency_classifier: str | None = None
    fluency_label: str = "clean"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.retain_log and self.retrained:
            raise UserError("--eval.retain_log and --eval.retrained both name the retrained model; give one of them")
        if self.depth and not (self.retrained and self.final):
            raise UserError(
                "--eval.depth compares hidden states of the exported model with those of a retrained model, which no "
                "log holds: give --eval.retrained MODEL, and leave --eval.final true"
            )
        for name in ("max_new_tokens", "tokens_per_batch", "prompts_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--eval.{name} must be at least 1, got {value}")
        if not 0 < self.min_k <= 1:
            raise UserError(f"--eval.min_k is a share of a row's tokens, above 0 and at most 1, got {self.min_k}")
        if self.generate_rows is not None and self.generate_rows < 0:
            raise UserError(f"--eval.generate_rows must be at least 0, got {self.generate_rows}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--eval.temperature must be 0 (greedy) or above, got {self.temperature}")
        for entry in self.metrics or []:
            if not {"class_path", "split"} <= set(entry) <= {"class_path", "split", "name", "init_args"}:
                keys = "class_path and split, optionally name and init_args"
                raise UserError(f"--eval.metrics: expected entries with {keys}, got {entry}")
        if self.splits == []:
            raise UserError("--eval.splits names no split: name one, or leave it null for all")

    def batch_sizes(self, trainer: Any) -> tuple[int, int]:
        """Tokens that are scored, and prompts that are continued, at once on the trainer's device."""
        tokens, prompts = (2048, 48) if trainer.strategy.root_device.type == "cpu" else (8192, 256)
        return self.tokens_per_batch or tokens, self.prompts_per_batch or prompts
