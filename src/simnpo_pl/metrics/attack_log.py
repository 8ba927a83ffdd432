"""The Min-K% attack on a retrained model, as logs of it hold it: what PrivLeak compares with."""

from dataclasses import dataclass, field
from typing import Any

import torch

from simnpo_pl.errors import UserError
from simnpo_pl.metrics.membership import membership_auc


@dataclass(frozen=True)
class MinKLog:
    """The attack on a retrained model.

    Attributes:
        source: where it was read.
        auc: area under the ROC curve of the forget against the holdout rows.
        forget: scores of the forget rows, by row index; None where the log holds just the area.
        holdout: the same of the holdout rows.
        questions: questions of the holdout split, for the rows where the log holds them.
        share: part of an answer's tokens that was averaged; None where the log does not say.
    """

    source: str
    auc: float
    forget: dict[int, float] | None = None
    holdout: dict[int, float] | None = None
    questions: dict[int, str] = field(default_factory=dict)
    share: float | None = None

    def match(self, forget: int, holdout: list[str], share: float) -> float:
        """The area, if the attack was made on these rows with this share.

        Args:
            forget: number of rows of the forget split.
            holdout: (M,) questions of the holdout split, in row order.
            share: part of an answer's tokens that is averaged.

        Raises:
            UserError: other rows or another share.
        """
        start = f"retrained model's log {self.source}: expected Min-K% scores"
        advice = "score the retrained model with the same --data.holdout and --eval.min_k and pass that log"
        for split, rows, count in (("forget", self.forget, forget), ("holdout", self.holdout, len(holdout))):
            if rows is not None and set(rows) != set(range(count)):
                raise UserError(f"{start} of {count} {split} rows, got {len(rows)} rows: {advice}")
        for row, question in enumerate(holdout):
            if row in self.questions and squeeze(question) not in squeeze(self.questions[row]):
                raise UserError(f"{start} of the holdout question {question!r}, got {self.questions[row]!r}: {advice}")
        if self.share is not None and self.share != share:
            raise UserError(f"{start} of the share {share}, got {self.share}: {advice}")
        return self.auc

    def rows(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Split to row index to what a row of our own format holds of it."""
        forget = {i: {"mia_min_k": score} for i, score in (self.forget or {}).items()}
        holdout: dict[int, dict[str, Any]] = {i: {"mia_min_k": score} for i, score in (self.holdout or {}).items()}
        for i, row in holdout.items():
            row |= {"min_k_share": self.share} if self.share is not None else {}
            row |= {"question": self.questions[i]} if i in self.questions else {}
        return {"forget": forget, "holdout": holdout}


def own_min_k(source: str, forget: dict[int, Any], holdout: dict[int, Any]) -> MinKLog | None:
    """The attack in rows of our own format, by index; None where a row has no score."""
    ours, theirs = ({i: row.get("mia_min_k") for i, row in part.items()} for part in (forget, holdout))
    if not ours or not theirs or None in (*ours.values(), *theirs.values()):
        return None
    return MinKLog(
        source,
        membership_auc(*(torch.tensor(list(part.values()), dtype=torch.float64) for part in (ours, theirs))),
        ours,
        theirs,
        {i: row["question"] for i, row in holdout.items() if "question" in row},
        next((row["min_k_share"] for row in holdout.values() if "min_k_share" in row), None),
    )


def public_min_k(source: str, held: dict[str, Any] | None) -> MinKLog | None:
    """The attack as open-unlearning writes it under "mia_min_k"."""
    if not held or held.get("auc") is None:
        return None
    forget, holdout = (held.get(split, {}).get("value_by_index") for split in ("forget", "holdout"))
    return MinKLog(source, float(held["auc"]), _scores(forget), _scores(holdout))


def by_index(values: Any) -> dict[int, Any]:
    """A list or an object with numbers as keys, by number."""
    return {int(i): v for i, v in (values.items() if isinstance(values, dict) else enumerate(values))}


def squeeze(text: str) -> str:
    """A text without its whitespace."""
    return "".join(text.split())


def _scores(values: Any) -> dict[int, float] | None:
    if values is None:
        return None
    return {i: float(v["score"] if isinstance(v, dict) else v) for i, v in by_index(values).items()}
