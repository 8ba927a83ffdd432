"""Your own questions and answers: one file to forget, one to retain."""

from typing import Any

from simnpo_pl.benchmarks.base import UnlearningData
from simnpo_pl.benchmarks.splits import add_forget_quality, decode_with, qa_set
from simnpo_pl.data.sources import load_jsonl, load_lines
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.data.training import TrainingRows
from simnpo_pl.errors import UserError
from simnpo_pl.evaluation.evaluation import Evaluation

COLUMNS = ("question", "answer")


class JsonlData(UnlearningData):
    """Rows from json files of the user's own.

    Rows have `question` and `answer`; with `paraphrased_answer` (a text) and `perturbed_answer` (a list of wrong
    answers) in every row of a file, the truth ratio is measured too, and forget quality where a retrained model is
    known.

    Args:
        forget: File of rows to forget, JSON lines or one array.
        retain: File of rows to keep.
        refusals: File of refusals, one a line, for IDK and DPO.
        retain_eval_rows: How many retain rows are measured, from the first; null for all.
        kwargs: Passed on to `UnlearningData`.
    """

    def __init__(
        self,
        forget: str,
        retain: str | None = None,
        refusals: str | None = None,
        retain_eval_rows: int | None = 400,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.forget = forget
        self.retain = retain
        self.refusals = refusals
        self.retain_eval_rows = retain_eval_rows

    def training_rows(self) -> TrainingRows:
        """Forget rows, retain rows and refusals."""
        return TrainingRows(
            forget=load_jsonl(self.forget, COLUMNS),
            retain=load_jsonl(self.retain, COLUMNS) if self.retain is not None else [],
            refusals=load_lines(self.refusals) if self.refusals is not None else [],
        )

    def build_evaluation(self, encode: PromptTemplate) -> Evaluation:
        """Probability, ROUGE and memorization of the forget rows; probability and ROUGE of the retain rows."""
        sets = [qa_set("forget", self.forget, load_jsonl(self.forget, COLUMNS), encode, self.eval)]
        if self.retain is not None:
            rows = load_jsonl(self.retain, COLUMNS)[: self.retain_eval_rows]
            sets.append(qa_set("retain", self.retain, rows, encode, self.eval))
        unavailable = {"model_utility": "it is defined by TOFU's real authors and world facts"}
        if "forget/truth_ratio" in sets[0].metrics:
            unavailable |= add_forget_quality(sets[0], self.find_retain_log(), self.forget)
        elif self.eval.retain_log or self.eval.retrained:
            raise UserError(
                f"forget quality compares truth ratios, but {self.forget} has no paraphrased_answer and "
                "perturbed_answer: add both columns, or leave out --eval.retain_log and --eval.retrained"
            )
        else:
            unavailable["forget_quality"] = f"{self.forget} has no paraphrased_answer and perturbed_answer"
        return Evaluation(sets, {}, unavailable, decode_with(self.tokenizer))
