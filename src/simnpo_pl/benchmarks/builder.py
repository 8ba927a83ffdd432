"""Builds what a benchmark measures: its splits, metrics over several splits, and why a metric is unavailable."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from simnpo_pl.data.sources import check_rows, load_lines, text_of, texts_of
from simnpo_pl.data.text import Texts, text_ids
from simnpo_pl.data.tokenization import PromptTemplate, TokenRow
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.fluency import FLUENCY, FluencyClassifier
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import Generation, Split
from simnpo_pl.evaluation.scoring import GRADIENT_NORM, MIN_K, MIN_K_PLUS_PLUS
from simnpo_pl.metrics.answers import AnswerProbability, ChoiceProbability, ForgetQuality, RowMean, TruthRatio
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.logs import RetainLog
from simnpo_pl.metrics.membership import ATTACKS, MembershipAUC, PrivLeak, ReferenceScore, ZlibScore
from simnpo_pl.utils.errors import UserError

PROBE = Path(__file__).with_name("probe.txt")
NO_RETRAINED = "no retrained model to compare with; give --eval.retain_log FILE or --eval.retrained MODEL"


class EvaluationBuilder:
    """Collects the splits and metrics of an evaluation.

    Attributes:
        splits: Split name to split, in the order of the results.
        summary: Metric name to a metric over several splits.
        unavailable: Metric name to the reason it is not measured.
    """

    def __init__(self, encode: PromptTemplate, options: EvalOptions) -> None:
        self.encode = encode
        self.options = options
        self.splits: dict[str, Split] = {}
        self.summary: dict[str, Metric] = {}
        self.unavailable: dict[str, str] = {}

    def evaluation(self) -> Evaluation:
        tokenizer: Any = self.encode.tokenizer
        if not any("retain" in name for name in self.splits):
            # Plain statements of common knowledge: damage shows in their loss. A tokenizer made of other text may know
            # hardly a word of them.
            encoder, known = replace(self.encode, truncate=True), load_lines(str(PROBE))
            texts = [text for text, ids in zip(known, text_ids(tokenizer, known), strict=True) if len(ids) > 1]
            if texts:
                self.text("probe", Texts(texts, "documents").encode(encoder, "probe"), texts)
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        return Evaluation(list(self.splits.values()), self.summary, self.unavailable, decode)

    def add(self, split: Split) -> Split:
        self.splits[split.name] = split
        return split

    def questions(
        self, name: str, rows: Sequence[dict[str, Any]], choice: bool = False, source: str | None = None
    ) -> Split:
        """Adds a split of questions, with the metrics that its columns allow.

        Args:
            name: First part of the metrics' names. `forget` aggregates the truth ratio as TOFU does for forgetting and
                adds extraction strength, exact memorization and, with a classifier, fluency.
            rows: With `question` and `answer`, and all or none with `paraphrased_answer` and `perturbed_answer`. The
                latter, a list, gives a truth ratio, in which the answer takes the place of a missing paraphrase.
            choice: Whether probability is that of the right answer among the wrong ones (TOFU's real authors and world
                facts) instead of the answer's own.
            source: What the rows are called in messages; by default `name`.

        Raises:
            UserError: A column does not hold texts, a row is repeated, or rows differ in the columns or the number of
                perturbed answers they have.
        """
        source, options, count = source or name, self.options, len(rows)
        # A choice is between the answer and wrong ones.
        rows = [{**row, "paraphrased_answer": None} for row in rows] if choice else rows
        texts, has_paraphrase = _answers(rows, source)
        kinds = len(texts[0])
        metrics: dict[str, RowMetric] = {
            f"{name}/probability": ChoiceProbability(count, kinds) if choice else AnswerProbability(count),
            f"{name}/rouge": RowMean("rougeL_recall", count),
        }
        if kinds > 1 + has_paraphrase:
            goal = "forget" if name == "forget" else "utility"
            metrics[f"{name}/truth_ratio"] = TruthRatio(count, kinds, options.truth_ratio, goal, has_paraphrase)
        fluency = None
        if name == "forget":
            for score in ("extraction_strength", "exact_memorization"):
                metrics[f"forget/{score}"] = RowMean(score, count)
            if options.fluency_classifier is None:
                self.unavailable["forget/fluency"] = "no classifier; give --eval.fluency_classifier FOLDER"
            else:
                metrics["forget/fluency"] = RowMean(FLUENCY, count)
                fluency = FluencyClassifier(options.fluency_classifier, options.fluency_label)
        pairs = [(row["question"], answer) for row, answers in zip(rows, texts, strict=True) for answer in answers]
        encoded = self.encode.encode_rows(pairs, source)
        answers = [encoded[start : start + kinds] for start in range(0, len(encoded), kinds)]
        prompts = [row[0].prompt_ids for row in answers[: options.generate_rows]]
        generation = Generation(prompts, options.max_new_tokens, self.encode.finish, fluency=fluency)
        split = self.add(Split(name, _pairs(rows), answers, metrics, generation, has_paraphrase))
        if all(isinstance(row.get("paraphrased_question"), str) for row in rows):
            split.paraphrases = [row["paraphrased_question"] for row in rows]
        return split

    def holdout(self, rows: Sequence[dict[str, Any]]) -> Split:
        """Adds questions and answers that only membership inference reads."""
        check_rows(rows, "holdout")
        encoded = self.encode.encode_rows([(row["question"], row["answer"]) for row in rows], "holdout")
        return self.add(Split("holdout", _pairs(rows), [[row] for row in encoded], {}))

    def text(
        self, name: str, rows: Sequence[TokenRow], texts: Sequence[str], scores: Sequence[str] = ("nll",)
    ) -> Split:
        """Adds a split of plain text, `rows` in tokens, every token of which but the first is scored.

        Measured are the means of the scores, see `evaluation.scoring.score_rows`.
        """
        metrics: dict[str, RowMetric] = {f"{name}/{score}": RowMean(score, len(rows)) for score in scores}
        # The beginning of a text is its question: two evaluations recognize the same row by question and answer.
        pairs = [{"question": text[:80], "answer": text} for text in texts]
        return self.add(Split(name, pairs, [[row] for row in rows], metrics))

    def forget_quality(self, log: RetainLog | None, source: str = "forget") -> None:
        """Compares the truth ratios of the split `forget` with a retrained model's.

        Raises:
            UserError: The log is of rows other than those of `source`, or has a truth ratio of some rows only.
        """
        if log is None:
            self.unavailable["forget_quality"] = NO_RETRAINED
            return
        forget = self.splits["forget"]
        # A log of PrivLeak may hold no forget row, as may an evaluation of other splits alone.
        rows = log.match("forget", forget.texts, forget.tokens, source) if log.splits["forget"] else []
        ratios = [row.get("truth_ratio") for row in rows]
        found = [ratio for ratio in ratios if ratio is not None]
        if not found:
            reason = f"the retrained model's log {log.source} has no truth ratios; score that model with wrong answers"
            self.unavailable["forget_quality"] = reason
        elif len(found) != len(ratios):
            raise UserError(
                f"retrained model's log {log.source}: expected a truth ratio of every row of {source}, got none of row "
                f"{ratios.index(None)}: score the retrained model again and pass that log"
            )
        else:
            retrained = torch.tensor(found, dtype=torch.float64)
            forget.metrics["forget_quality"] = ForgetQuality(
                len(ratios), forget.kinds, retrained, has_paraphrase=forget.has_paraphrase
            )

    def membership_inference(self, log: RetainLog | None = None, reference: Mapping[str, Tensor] | None = None) -> None:
        """Attacks the splits `forget` and `holdout`; without a split `holdout`, says that there is none.

        Args:
            log: The retrained model's rows, for PrivLeak.
            reference: Losses of both splits' answers under the reference model, `(N,)` and `(M,)` nats per token.

        Raises:
            UserError: An attack was asked for without holdout rows, or the log is of other rows.
        """
        if "holdout" not in self.splits:
            asked = [f"--eval.{name}" for name in ("mia_reference", "gradnorm") if getattr(self.options, name)]
            if asked:
                compares = "this compares forget with holdout rows"
                raise UserError(f"{' and '.join(asked)}: {compares}; give --data.holdout too")
            self.unavailable |= dict.fromkeys((*ATTACKS, "privleak"), "no holdout rows; give --data.holdout")
            return
        forget, holdout = self.splits["forget"], self.splits["holdout"]
        for text in holdout.texts:
            # Logged by row: a log of another share cannot be compared with.
            text["min_k_share"] = self.options.min_k
        for split in (forget, holdout):
            count = len(split.texts)
            pairs = zip(split.texts, split.answers, strict=True)
            split.scores |= {
                "mia_loss": RowMean("nll", count),
                "mia_zlib": ZlibScore([self._scored(text["answer"], answers[0]) for text, answers in pairs]),
                "mia_min_k": RowMean(MIN_K, count),
                "mia_min_k_plus_plus": RowMean(MIN_K_PLUS_PLUS, count),
            }
            if reference is not None:
                split.scores["mia_reference"] = ReferenceScore(reference[split.name])
            if self.options.gradnorm:
                split.scores["mia_gradnorm"] = RowMean(GRADIENT_NORM, count)
        if reference is None:
            named, lacking = self.options.mia_reference, "no reference model; give --eval.mia_reference MODEL"
            self.unavailable["mia_reference"] = f"{named} is not measured beside attacks" if named else lacking
        if not self.options.gradnorm:
            self.unavailable["mia_gradnorm"] = "it takes a backward pass a row; ask for it by --eval.gradnorm true"
        attacks = {name: MembershipAUC(score, holdout.scores[name]) for name, score in forget.scores.items()}
        self.summary |= attacks
        if log is None:
            self.unavailable["privleak"] = NO_RETRAINED
        elif log.auc is None:
            self.unavailable["privleak"] = (
                f"the retrained model's log {log.source} has no Min-K% scores; score that model with --data.holdout"
            )
        else:
            self._check_attack(log)
            if log.auc < 1:
                self.summary["privleak"] = PrivLeak(attacks["mia_min_k"], log.auc)
            else:
                self.unavailable["privleak"] = (
                    f"the retrained model's AUC of Min-K% is {log.auc:g}, and PrivLeak divides by 1 - AUC"
                )

    def _scored(self, answer: str, row: TokenRow) -> str:
        """An answer without what was cut off: it has no end, as plain text, which has no prompt."""
        start = len(row.prompt_ids)
        if row.end or start < 2:
            return answer
        return str(self.encode.tokenizer.decode(row.input_ids[start:], skip_special_tokens=True)).strip()

    def _check_attack(self, log: RetainLog) -> None:
        """Refuses a log whose Min-K% scores are of other rows or of another share; some logs hold the AUC alone."""
        share = self.options.min_k
        for split in (self.splits["forget"], self.splits["holdout"]):
            rows = log.match(split.name, split.texts, split.tokens) if log.splits[split.name] else []
            for other in {row.get("min_k_share", share) for row in rows} - {share}:
                raise UserError(
                    f"retrained model's log {log.source}: expected Min-K% scores of the share {share}, got {other}: "
                    "score the retrained model with the same --eval.min_k and pass that log"
                )


def _pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"question": row["question"], "answer": row["answer"]} for row in rows]


def _answers(rows: Sequence[dict[str, Any]], source: str) -> tuple[list[list[str]], bool]:
    """Each row's answer, its paraphrase and its wrong answers, and whether there are paraphrases."""
    check_rows(rows, source)
    for index, row in enumerate(rows):
        where = f"{source} row {index}, counted from 0"
        if row.get("paraphrased_answer"):
            text_of(row, "paraphrased_answer", where)
        if row.get("perturbed_answer"):
            texts_of(row, "perturbed_answer", where)
    for column in ("paraphrased_answer", "perturbed_answer"):
        having = [bool(row.get(column)) for row in rows]
        if any(having) and not all(having):
            raise UserError(
                f"{source}: row {having.index(False)} (counted from 0) has no {column} while others have; "
                "give it to all rows or none"
            )
    has_paraphrase = all(row.get("paraphrased_answer") for row in rows)
    texts = [
        [r["answer"], *([r["paraphrased_answer"]] if has_paraphrase else []), *(r.get("perturbed_answer") or [])]
        for r in rows
    ]
    sizes = sorted({len(answers) for answers in texts})
    if len(sizes) != 1:
        found = f"{source}: rows have {sizes[0]} to {sizes[-1]} answers"
        raise UserError(f"{found}; give every row the same number of perturbed answers")
    return texts, has_paraphrase
