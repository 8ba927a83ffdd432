"""Membership inference for any benchmark that has holdout rows: which attacks its evaluation can make."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from simnpo_pl.benchmarks.splits import NO_RETRAINED
from simnpo_pl.data.sources import check_disjoint, load_jsonl, load_split
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.evaluation.gradients import GRADIENT_NORM
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.plan import EvalSet
from simnpo_pl.evaluation.scoring import MIN_K, MIN_K_PLUS_PLUS
from simnpo_pl.metrics.answers import RowMean
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.logs import RetainLog
from simnpo_pl.metrics.membership import ATTACKS, MembershipAUC, PrivLeak, ReferenceScore, ZlibScore
from simnpo_pl.utils.errors import UserError


@dataclass
class Attacks:
    """What membership inference adds to an evaluation.

    Args:
        metrics: Metrics over the forget and holdout splits, by name.
        unavailable: Those that cannot be measured, with the reason.
    """

    metrics: dict[str, Metric]
    unavailable: dict[str, str]


def load_holdout(holdout: str, path: str, forget: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Holdout rows, of which none may be a forget row.

    Args:
        holdout: A json file, or a split expression of the data set.
        path: The data set: hub id or folder.
        forget: Forget rows.

    Raises:
        UserError: The rows are missing, or are forget rows too.
    """
    columns = ("question", "answer")
    is_file = holdout.endswith((".json", ".jsonl")) or Path(holdout).expanduser().is_file()
    rows = load_jsonl(holdout, columns) if is_file else load_split(path, holdout, columns)
    check_disjoint(forget, rows, "holdout")
    return rows


def holdout_set(rows: Sequence[dict[str, Any]], split: str, encode: PromptTemplate) -> EvalSet:
    """The holdout rows' answers in tokens; only their scores by row are read.

    Args:
        rows: With `question` and `answer`.
        split: What the rows are called in messages.
        encode: Tokenises question and answer.
    """
    encoded = encode.encode_rows([(row["question"], row["answer"]) for row in rows], split)
    texts = [{"question": row["question"], "answer": row["answer"]} for row in rows]
    return EvalSet("holdout", texts, [[row] for row in encoded], {})


def add_attacks(
    forget: EvalSet,
    holdout: EvalSet | None,
    options: EvalOptions,
    log: RetainLog | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> Attacks:
    """Give the forget and holdout splits the scores of the attacks, and say what comes of them.

    Args:
        forget: The forget split.
        holdout: The holdout split; None where the user gave none.
        options: Which attacks are wanted.
        log: The retrained model's rows, for PrivLeak.
        reference: Losses of both splits' answers under the reference model, `(N,)` and `(M,)` nats per token.

    Raises:
        UserError: An attack was asked for without holdout rows, or the log is of other rows.
    """
    if holdout is None:
        asked = [f"--eval.{n}" for n in ("mia_reference", "gradnorm") if getattr(options, n)]
        if asked:
            raise UserError(f"{' and '.join(asked)}: this compares forget with holdout rows; give --data.holdout too")
        return Attacks({}, dict.fromkeys((*ATTACKS, "privleak"), "no holdout rows; give --data.holdout"))
    for text in holdout.texts:
        # Logged by row: a log of another share cannot be compared with.
        text["min_k_share"] = options.min_k
    reasons = {}
    for part in (forget, holdout):
        answers = [text["answer"] for text in part.texts]
        count = len(answers)
        scores: dict[str, RowMetric] = {
            "mia_loss": RowMean("nll", count),
            "mia_zlib": ZlibScore(answers),
            "mia_min_k": RowMean(MIN_K, count),
            "mia_min_k_plus_plus": RowMean(MIN_K_PLUS_PLUS, count),
        }
        if reference is not None:
            scores["mia_reference"] = ReferenceScore(reference[part.name])
        if options.gradnorm:
            scores["mia_gradnorm"] = RowMean(GRADIENT_NORM, count)
        part.scores |= scores
    if reference is None:
        reasons["mia_reference"] = "no reference model; give --eval.mia_reference MODEL"
    if not options.gradnorm:
        reasons["mia_gradnorm"] = "it takes a backward pass a row; ask for it by --eval.gradnorm true"
    attacks = {name: MembershipAUC(forget.scores[name], holdout.scores[name]) for name in scores}
    metrics: dict[str, Metric] = dict(attacks)
    if log is None:
        reasons["privleak"] = NO_RETRAINED
    elif log.auc is None:
        reasons["privleak"] = (
            f"the retrained model's log {log.source} has no Min-K% scores; score that model with --data.holdout"
        )
    else:
        _check_attack(log, (forget, holdout), options.min_k)
        if log.auc < 1:
            metrics["privleak"] = PrivLeak(attacks["mia_min_k"], log.auc)
        else:
            reasons["privleak"] = f"the retrained model's AUC of Min-K% is {log.auc:g}, and PrivLeak divides by 1 - AUC"
    return Attacks(metrics, reasons)


def _check_attack(log: RetainLog, sets: Sequence[EvalSet], share: float) -> None:
    """Refuse a log whose Min-K% scores are of other rows or of another share; some logs hold the AUC alone."""
    for part in sets:
        rows = log.match(part.name, part.texts, part.tokens) if log.parts[part.name] else []
        for other in {row.get("min_k_share", share) for row in rows} - {share}:
            raise UserError(
                f"retrained model's log {log.source}: expected Min-K% scores of the share {share}, got {other}: score "
                "the retrained model with the same --eval.min_k and pass that log"
            )
