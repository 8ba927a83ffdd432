"""TOFU: forget some of 200 fictional authors, keep the others, real authors and world facts (arXiv 2401.06121)."""

import re
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from simnpo_pl.benchmarks.base import UnlearningData
from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.sources import check_disjoint, hub_file, is_file, load_lines, load_split, load_table
from simnpo_pl.data.training import TrainingRows
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.metrics.answers import ModelUtility
from simnpo_pl.metrics.export import open_unlearning_log
from simnpo_pl.metrics.logs import RetainLog, read_retain_log
from simnpo_pl.utils.errors import UserError, nearest

QUESTIONS = ("question", "answer")
ANSWERS = (*QUESTIONS, "paraphrased_answer", "perturbed_answer")
CHOICES = (*QUESTIONS, "perturbed_answer")
COLUMNS = {"forget": ANSWERS, "retain": ANSWERS, "real_authors": CHOICES, "world_facts": CHOICES}
"""Columns that are read of each split that is measured."""


class TofuData(UnlearningData):
    """TOFU's splits, training pairs and metrics.

    Args:
        path: Hub data set or folder with TOFU's json files.
        forget_split: Authors to forget and to measure: forget01, forget05 or forget10.
        retain_split: Rows of the retain loss; null takes the complement of `forget_split`. Splits may be cut and
            joined as in "retain99[:200]" or "forget01+retain99[:200]".
        train_split: Rows the objective is applied to; null takes `forget_split`. A start model is fine-tuned on
            "full", a retrained one on "retain90".
        forget_eval_split: Rows of the forget metrics; null takes `forget_split` with "_perturbed".
        retain_eval_split: Rows of the retain metrics.
        real_authors_split: Rows of the real-authors metrics.
        world_facts_split: Rows of the world-facts metrics.
        holdout: Rows like the forget rows that no model was trained on, for membership inference: a json file, or a
            split such as "holdout10"; null measures none of it.
        refusals: File of refusals, one a line, for IDK, DPO and JensUn; null looks for idontknow.jsonl in `path`.
        kwargs: Passed on to `UnlearningData`.
    """

    def __init__(
        self,
        path: str = "locuslab/TOFU",
        forget_split: str = "forget10",
        retain_split: str | None = None,
        train_split: str | None = None,
        forget_eval_split: str | None = None,
        retain_eval_split: str = "retain_perturbed",
        real_authors_split: str = "real_authors_perturbed",
        world_facts_split: str = "world_facts_perturbed",
        holdout: str | None = None,
        refusals: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.forget_split = forget_split
        self.retain_split = retain_split or _complement(forget_split)
        self.train_split = train_split or forget_split
        self.eval_splits = {
            "forget": forget_eval_split or f"{forget_split}_perturbed",
            "retain": retain_eval_split,
            "real_authors": real_authors_split,
            "world_facts": world_facts_split,
        }
        self.holdout = holdout
        self.refusals = refusals

    def training_rows(self, parts: Collection[str]) -> TrainingRows:
        """Forget rows, and what else the losses ask for: retain rows, refusals."""
        own = Path(self.path).expanduser() / "idontknow.jsonl"
        refusals = str(own) if self.refusals is None and own.is_file() else self.refusals
        return TrainingRows(
            forget=load_split(self.path, self.train_split, QUESTIONS),
            retain=load_split(self.path, self.retain_split, QUESTIONS) if "retain" in parts else [],
            refusals=load_lines(refusals) if "alternate" in parts and refusals is not None else [],
        )

    @cached_property
    def _published_log(self) -> RetainLog | None:
        """The retrained model's log that was published together with the start model."""
        published = re.fullmatch(r"open-unlearning/(tofu_.+)_full", self.model_name or "")
        split = re.match(r"forget\d\d", self.forget_split)
        if published is None or split is None:
            return None
        log = f"hf://datasets/open-unlearning/eval/{published[1]}_{_complement(split[0])}/TOFU_EVAL.json"
        return read_retain_log(hub_file(log), self.eval.truth_ratio)

    def find_retain_log(self) -> RetainLog | None:
        """As in any benchmark; a published start model is compared with the published log of its retrained model."""
        return super().find_retain_log() or (None if self.eval.retrained else self._published_log)

    def build_evaluation(self, build: EvaluationBuilder) -> None:
        """Adds the four splits with TOFU's metrics, model utility, forget quality and membership inference."""
        rows = {name: load_split(self.path, self.eval_splits[name], columns) for name, columns in COLUMNS.items()}
        check_disjoint(rows["forget"], rows["retain"], "retain")
        for name, columns in COLUMNS.items():
            source = self.eval_splits[name]
            split = build.questions(name, rows[name], choice=columns == CHOICES, source=source)
            if f"{name}/truth_ratio" not in split.metrics:
                raise UserError(f"{source}: expected wrong answers in perturbed_answer, got empty lists: give them")
        build.summary["model_utility"] = ModelUtility(
            {
                f"{name}/{metric}": build.splits[name].metrics[f"{name}/{metric}"]
                for name in ("retain", "real_authors", "world_facts")
                for metric in ("probability", "rouge", "truth_ratio")
            }
        )
        forget = self.eval_splits["forget"].replace("_perturbed", "")
        for text in build.splits["forget"].texts:
            text["forget_split"] = forget
        # The published log that nobody named may be of other rows, or not be there.
        named = bool(self.retrained_log or self.eval.retrained or self.eval.retain_log)
        try:
            log = self.find_retain_log()
            build.forget_quality(log, forget)
        except UserError as error:
            if named:
                raise
            rank_zero_warn(f"no forget quality: {error}")
            self._published_log = log = None
            build.forget_quality(None)
        if self.holdout is not None:
            if is_file(self.holdout):
                holdout = load_table(self.holdout, "--data.holdout", QUESTIONS)
            else:
                holdout = load_split(self.path, self.holdout, QUESTIONS)
            check_disjoint(rows["forget"], holdout, "holdout")
            build.holdout(holdout)
        try:
            build.membership_inference(log, self.reference_losses)
        except UserError as error:
            if named or self.holdout is None:
                raise
            build.unavailable["privleak"] = str(error)

    def export(self, result: EvalResult) -> dict[str, Any]:
        """TOFU_EVAL.json, as open-unlearning writes it."""
        return {"TOFU_EVAL.json": open_unlearning_log(result.rows, result.values)}


def _complement(forget_split: str) -> str:
    match = re.fullmatch(r"forget(\d\d)", forget_split)
    if match is None:
        closest = nearest(forget_split, ("forget01", "forget05", "forget10"))
        raise UserError(
            f"--data.forget_split {forget_split}: TOFU has forget01, forget05 and forget10{closest}; for another split "
            "give --data.retain_split too"
        )
    return f"retain{100 - int(match[1])}"
