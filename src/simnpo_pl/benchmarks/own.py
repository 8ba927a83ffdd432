"""Custom data: rows to forget, to retain and to hold out, in any form and from anywhere."""

from collections.abc import Collection
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from simnpo_pl.benchmarks.answers import START_ANSWERS, Answer, keep_answers, neutral_prompts, write_rows
from simnpo_pl.benchmarks.base import UnlearningData
from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.columns import Columns, Records
from simnpo_pl.data.sources import check_disjoint, check_rows, load_lines, load_table
from simnpo_pl.data.text import Texts
from simnpo_pl.data.training import Rows, TrainingRows, items_of
from simnpo_pl.evaluation.plan import Split
from simnpo_pl.utils.errors import UserError

AUTO = "auto"
"""Value of `--data.retain` that asks for what the start model answers."""
COLUMNS = Columns()
ONLY_FIT = f"only `fit` makes the rows of --data.retain auto; give --data.retain RUN/{START_ANSWERS}"


class OwnData(UnlearningData):
    """Custom questions and answers, chats or plain text.

    The rows decide what is measured; the results say what is not measured, and why. Every source is a file (.jsonl,
    .json, .csv, .parquet, .txt), or a folder or OWNER/NAME on the hub that the `datasets` package loads, with `:SPLIT`
    or `:CONFIGURATION/SPLIT` after it where it has several.

    Args:
        forget: Rows to forget.
        retain: Rows to keep; `auto` keeps what the start model answers to neutral prompts before training, which `fit`
            writes to `retain_auto.jsonl` in the run folder.
        holdout: Rows like the forget rows that no model was trained on, for membership inference and PrivLeak.
        refusals: File of refusals, one a line, for IDK, DPO and JensUn.
        columns: Names of the columns that are read.
        forget_columns: Those of the forget rows; null takes `columns`.
        retain_columns: Those of the retain rows; null takes `columns`.
        holdout_columns: Those of the holdout rows; null takes `columns`.
        template_question: For records: the question, with the names of columns in braces, such as "Where does {name}
            live?". A source that has none of these columns is read by its own.
        template_answer: For records: the answer, such as "{city}".
        rows: Plain text is joined and cut in `blocks` of `max_length` tokens, or each of the `documents` is a row.
        retain_eval_rows: How many retain rows are measured, from the first; null for all.
        kwargs: Passed on to `UnlearningData`.
    """

    def __init__(
        self,
        forget: str,
        retain: str | None = None,
        holdout: str | None = None,
        refusals: str | None = None,
        columns: Columns = COLUMNS,
        forget_columns: Columns | None = None,
        retain_columns: Columns | None = None,
        holdout_columns: Columns | None = None,
        template_question: str | None = None,
        template_answer: str | None = None,
        rows: Literal["blocks", "documents"] = "blocks",
        retain_eval_rows: int | None = 400,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if retain_eval_rows is not None and retain_eval_rows < 1:
            raise UserError(f"--data.retain_eval_rows must be at least 1, or null for all, got {retain_eval_rows}")
        if (template_question is None) != (template_answer is None):
            raise UserError("--data.template_question and --data.template_answer: give both, or neither")
        given = {"forget": forget, "retain": None if retain == AUTO else retain, "holdout": holdout}
        self.sources = {name: source for name, source in given.items() if source is not None}
        self.keeps_start_answers = retain == AUTO
        self.refusals = refusals
        own = {"forget": forget_columns, "retain": retain_columns, "holdout": holdout_columns}
        if Path(retain or "").name == START_ANSWERS:
            own["retain"] = COLUMNS
        self.columns = {name: chosen or columns for name, chosen in own.items()}
        self.records = None
        if template_question is not None and template_answer is not None:
            self.records = Records(template_question, template_answer)
        self.rows: Literal["blocks", "documents"] = rows
        self.retain_eval_rows = retain_eval_rows
        self._read: dict[str, Rows] = {}

    def make_rows(self, parts: Collection[str], folder: Path, answer: Answer) -> None:
        """Retain the start model's answers to neutral prompts, made once for a run folder, if `retain` is `auto`."""
        super().make_rows(parts, folder, answer)
        if not self.keeps_start_answers:
            return
        # Mistakes in the forget rows show first.
        forget, file = self._rows("forget"), folder / START_ANSWERS
        if not file.is_file():
            generated = answer(neutral_prompts(self.encoder, self.eval)).rows
            known = [] if isinstance(forget, Texts) else [row["answer"] for row in forget]
            write_rows(self.trainer, file, keep_answers(generated, known, self.encoder))
        self.sources["retain"], self.columns["retain"] = str(file), COLUMNS

    def training_rows(self, parts: Collection[str]) -> TrainingRows:
        """Forget rows, retain rows and refusals."""
        if self.keeps_start_answers and "retain" in parts and "retain" not in self.sources:
            raise UserError(ONLY_FIT)
        return TrainingRows(
            forget=self._rows("forget"),
            retain=self._rows("retain") if "retain" in self.sources else [],
            refusals=load_lines(self.refusals) if self.refusals is not None else [],
        )

    def build_evaluation(self, build: EvaluationBuilder) -> None:
        """Adds whatever the rows allow."""
        rows = {name: self._rows(name) for name in self.sources}
        for one, other in combinations(rows, 2):
            check_disjoint(items_of(rows[one]), items_of(rows[other]), other, one)
        is_text = isinstance(rows["forget"], Texts)
        forget = self._add(build, "forget")
        build.unavailable["model_utility"] = "it is defined by TOFU's real authors and world facts"
        if "retain" in rows:
            self._add(build, "retain")
        else:
            reason = ONLY_FIT if self.keeps_start_answers else "no retain rows; give --data.retain FILE"
            build.unavailable |= dict.fromkeys(("retain/probability", "retain/rouge"), reason)
        has_ratio = "forget/truth_ratio" in forget.metrics
        if (self.eval.retain_log or self.eval.retrained) and not has_ratio and "holdout" not in rows:
            raise UserError(
                "there is nothing to compare with a retrained model: give forget rows with a list of wrong answers in "
                f"column {self.columns['forget'].perturbed_answer} (forget quality) or --data.holdout (PrivLeak), or "
                "leave out --eval.retain_log and --eval.retrained"
            )
        log = self.find_retain_log()
        if has_ratio:
            build.forget_quality(log, self.sources["forget"])
        else:
            reason = "the forget rows have no wrong answers, see --data.columns.perturbed_answer"
            reason = "plain text has no wrong answers" if is_text else reason
            build.unavailable |= dict.fromkeys(("forget/truth_ratio", "forget_quality"), reason)
        if "holdout" in rows:
            if isinstance(rows["holdout"], Texts) != is_text:
                form = "expected the form of the forget rows; give both as plain text or neither"
                raise UserError(f"--data.holdout: {form}")
            self._add(build, "holdout")
        build.membership_inference(log, self.reference_losses)
        if is_text:
            reason = "plain text has no questions to answer"
            build.unavailable |= dict.fromkeys(("forget/rouge", "forget/fluency"), reason)

    def _rows(self, name: str) -> Rows:
        """Rows of one of the sources, read once."""
        if name not in self._read:
            source, option = self.sources[name], f"--data.{name}"
            found = self.columns[name].read(load_table(source, option), f"{option} {source}", self.records)
            texts = [row for row in found if isinstance(row, str)]
            # Text that is cut in blocks may repeat a paragraph.
            if not texts or self.rows == "documents":
                check_rows(found, name)
            self._read[name] = Texts(texts, self.rows) if texts else [row for row in found if isinstance(row, dict)]
        return self._read[name]

    def _add(self, build: EvaluationBuilder, name: str) -> Split:
        rows = self._rows(name)
        most = self.retain_eval_rows if name == "retain" else None
        if isinstance(rows, Texts):
            encoded = rows.encode(build.encode, name)[:most]
            texts = [self.tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in encoded]
            scores = {"forget": ("nll", "exact_memorization", "extraction_strength"), "holdout": ()}.get(name, ("nll",))
            return build.text(name, encoded, texts, scores)
        return build.holdout(rows) if name == "holdout" else build.questions(name, rows[:most])
