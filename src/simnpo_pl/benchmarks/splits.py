"""Question-answer splits to measure: which columns a split has decides which metrics it can have."""

from collections.abc import Sequence
from typing import Any

import torch

from simnpo_pl.data.sources import check_rows
from simnpo_pl.data.text import Texts
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.evaluation.fluency import FLUENCY, FluencyClassifier
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import EvalSet, Generation
from simnpo_pl.metrics.answers import AnswerProbability, ChoiceProbability, ForgetQuality, RowMean, TruthRatio
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.logs import RetainLog
from simnpo_pl.utils.errors import UserError

NO_RETRAINED = "no retrained model to compare with; give --eval.retain_log FILE or --eval.retrained MODEL"


def qa_set(
    name: str,
    split: str,
    rows: Sequence[dict[str, Any]],
    encode: PromptTemplate,
    options: EvalOptions,
    choice: bool = False,
) -> EvalSet:
    """Answers of a split in tokens, with the metrics its columns allow.

    A split with `perturbed_answer` (a list) has a truth ratio, in which the answer takes the place of a
    `paraphrased_answer` it lacks.

    Args:
        name: First part of the metrics' names; `forget` aggregates the truth ratio as TOFU does for forgetting
            and adds extraction strength, exact memorization and, with a classifier, fluency.
        split: What the rows are called in messages.
        rows: With `question` and `answer`; all or none with `paraphrased_answer` and `perturbed_answer`.
        encode: Tokenises question and answer.
        options: What is measured.
        choice: Whether probability is that of the right answer among the wrong ones, as TOFU has it for real authors
            and world facts, instead of the answer's own.

    Raises:
        UserError: A column does not hold texts, a row is repeated, or rows differ in the columns or the number of
            perturbed answers they have.
    """
    check_rows(rows, split)
    _check_texts(rows, split)
    paraphrased = _all_or_none(rows, "paraphrased_answer", split)
    perturbed = _all_or_none(rows, "perturbed_answer", split)
    texts = [
        [
            r["answer"],
            *([r["paraphrased_answer"]] if paraphrased else []),
            *(r["perturbed_answer"] if perturbed else []),
        ]
        for r in rows
    ]
    sizes = sorted({len(answers) for answers in texts})
    if len(sizes) != 1:
        raise UserError(
            f"{split}: rows have {sizes[0]} to {sizes[-1]} answers; give every row the same number of perturbed answers"
        )
    count, kinds = len(rows), sizes[0]
    generated = count if options.generate_rows is None else min(count, options.generate_rows)
    pairs = [(row["question"], answer) for row, answers in zip(rows, texts, strict=True) for answer in answers]
    encoded = encode.encode_rows(pairs, split)
    metrics: dict[str, RowMetric] = {
        f"{name}/probability": ChoiceProbability(count, kinds) if choice else AnswerProbability(count),
        f"{name}/rouge": RowMean("rougeL_recall", count),
    }
    if perturbed:
        metrics[f"{name}/truth_ratio"] = TruthRatio(
            count,
            kinds,
            convention=options.truth_ratio,
            aggregate="forget" if name == "forget" else "utility",
            has_paraphrase=paraphrased,
        )
    if name == "forget":
        metrics["forget/extraction_strength"] = RowMean("extraction_strength", count)
        metrics["forget/exact_memorization"] = RowMean("exact_memorization", count)
    fluency = None
    if name == "forget" and options.fluency_classifier is not None:
        metrics["forget/fluency"] = RowMean(FLUENCY, count)
        fluency = FluencyClassifier(options.fluency_classifier, options.fluency_label)
    answers = [encoded[i * kinds : (i + 1) * kinds] for i in range(count)]
    prompts = [row[0].prompt_ids for row in answers[:generated]]
    return EvalSet(
        name=name,
        texts=[{"question": row["question"], "answer": row["answer"]} for row in rows],
        answers=answers,
        metrics=metrics,
        generation=Generation(prompts, options.max_new_tokens, encode.finish, fluency=fluency),
        has_paraphrase=paraphrased,
    )


def text_set(name: str, texts: Texts, encode: PromptTemplate, most: int | None = None) -> EvalSet:
    """Rows of plain text, every token of which is scored.

    Args:
        name: First part of the metrics' names; `forget` adds extraction strength and exact memorization, `holdout`
            has no metrics of its own.
        texts: The texts, and whether they are cut in blocks.
        encode: Brings tokenizer and longest length.
        most: Rows that are measured, from the first; None for all.

    Raises:
        UserError: The text cannot be tokenised as asked.
    """
    rows = texts.encode(encode, name)[:most]
    found = [encode.tokenizer.decode(row.input_ids, skip_special_tokens=True) for row in rows]
    scores = {"forget": ("nll", "exact_memorization", "extraction_strength"), "holdout": ()}.get(name, ("nll",))
    metrics: dict[str, RowMetric] = {f"{name}/{score}": RowMean(score, len(rows)) for score in scores}
    # The beginning of a text stands for a question, by which rows of two evaluations are known to be the same.
    return EvalSet(name, [{"question": t[:80], "answer": t} for t in found], [[row] for row in rows], metrics)


def not_rated(options: EvalOptions) -> dict[str, str]:
    """Why the forget answers' fluency is not measured, if it is not."""
    asked = options.fluency_classifier is not None
    return {} if asked else {"forget/fluency": "no classifier; give --eval.fluency_classifier FOLDER"}


def add_forget_quality(forget: EvalSet, log: RetainLog | None, split: str) -> dict[str, str]:
    """Give the forget split its forget quality.

    Args:
        forget: The forget split.
        log: Rows of the retrained model.
        split: Name of the split, which the log must share.

    Returns:
        Metrics that are not available, with the reason.

    Raises:
        UserError: The log is of other rows, or has a truth ratio of some rows only.
    """
    if log is None:
        return {"forget_quality": NO_RETRAINED}
    ratios = [row.get("truth_ratio") for row in log.match("forget", forget.texts, forget.tokens, split)]
    found = [ratio for ratio in ratios if ratio is not None]
    if not found:
        reason = f"the retrained model's log {log.source} has no truth ratios; score that model with wrong answers"
        return {"forget_quality": reason}
    if len(found) != len(ratios):
        raise UserError(
            f"retrained model's log {log.source}: expected a truth ratio of every row of {split}, got none of row "
            f"{ratios.index(None)}: score the retrained model again and pass that log"
        )
    forget.metrics["forget_quality"] = ForgetQuality(
        len(ratios), forget.kinds, torch.tensor(found, dtype=torch.float64), has_paraphrase=forget.has_paraphrase
    )
    return {}


def decode_with(tokenizer: Any) -> Any:
    """Function from token ids to text, special tokens left out."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return decode


def _check_texts(rows: Sequence[dict[str, Any]], split: str) -> None:
    for index, row in enumerate(rows):
        value = row.get("paraphrased_answer")
        if value and not (isinstance(value, str) and value.strip()):
            raise UserError(
                f"{split} row {index}, counted from 0: expected text as paraphrased_answer, got {str(value)[:80]!r}; "
                "mend or remove the row"
            )
        wrong = row.get("perturbed_answer") or []
        if not (isinstance(wrong, list) and all(isinstance(text, str) and text.strip() for text in wrong)):
            raise UserError(
                f"{split} row {index}, counted from 0: expected a list of texts as perturbed_answer, got "
                f"{str(wrong)[:80]!r}; mend or remove the row"
            )


def _all_or_none(rows: Sequence[dict[str, Any]], column: str, split: str) -> bool:
    having = [bool(row.get(column)) for row in rows]
    if any(having) and not all(having):
        raise UserError(
            f"{split}: row {having.index(False)} (counted from 0) has no {column} while others have; "
            "give it to all rows or none"
        )
    return all(having)
