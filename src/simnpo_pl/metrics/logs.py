"""Logs of retrained models.

Forget quality and PrivLeak compare with a retrained model that was scored elsewhere, perhaps by other code: three
formats are read, and a log that does not cover the same questions is refused.
"""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.errors import UserError
from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.attack_log import MinKLog, by_index, own_min_k, public_min_k, squeeze

LOG_NAMES = ("rows.jsonl", "TOFU_EVAL.json", "eval_log_aggregated.json")


@dataclass(frozen=True)
class RetainLog:
    """The forget split as a retrained model scored it, by row index.

    Attributes:
        source: the file it was read from.
        split: name of the forget split ("forget10") where the log says so.
        truth_ratio: geometric R = W/P of every row.
        paraphrase_nll: nats per token.
        perturbed_nll: nats per token, one per wrong answer.
        answers: true answers, for the rows where the log holds them.
        questions: questions, possibly inside a prompt template, for the rows where the log holds them.
        values: aggregates by metric name, where the log holds them.
        min_k: the Min-K% attack, where the log holds it.
    """

    source: str
    split: str | None
    truth_ratio: dict[int, float]
    paraphrase_nll: dict[int, float] = field(default_factory=dict)
    perturbed_nll: dict[int, list[float]] = field(default_factory=dict)
    answers: dict[int, str] = field(default_factory=dict)
    questions: dict[int, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    min_k: MinKLog | None = None

    def rows(self) -> list[dict[str, Any]]:
        """What enters a comparison, as rows of our own format."""
        splits = self.min_k.rows() if self.min_k is not None else {"forget": {}}
        for i, ratio in self.truth_ratio.items():
            splits["forget"].setdefault(i, {})["truth_ratio"] = ratio
        return [{"split": s, "index": i, **part[i]} for s, part in splits.items() for i in sorted(part)]


def read_retain_log(path: Path) -> RetainLog:
    """Read a retrained model's log of the forget split.

    Knows, by content: our `rows.jsonl` (rows may name the split under "forget_split"), open-unlearning's
    `TOFU_EVAL.json`, also under a key "metrics", and TOFU's `eval_log_aggregated.json` or its forget part;
    each may be gzipped, or lie in the folder that `path` names. R is computed from the losses, whatever the
    log's own convention; an open-unlearning log without losses has its scores taken for geometric ones.

    Raises:
        UserError: no such file, an unknown format, or a row without the losses R needs.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in LOG_NAMES if (path / name).is_file()), path / LOG_NAMES[0])
    if not path.is_file():
        raise UserError(
            f"retrained model's log: expected a run folder or a log file, got no file at {path}: "
            "score the retrained model first and pass its run folder"
        )
    try:
        raw = path.read_bytes()
        return _parse(str(path), (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode())
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, EOFError) as error:
        raise UserError(
            f"retrained model's log: expected the content of {' or '.join(LOG_NAMES)}, got {path}, which "
            f"cannot be read as any of them ({error!r}): check that the file is complete"
        ) from error


def match_rows(log: RetainLog, questions: list[str], answers: list[str], split: str) -> Tensor:
    """The log's truth ratios in row order, if it covers exactly these questions.

    Texts are compared where the log holds them, without their whitespace, since public logs store cleaned-up
    text ("," for " ,") and questions inside a prompt template.

    Args:
        log: what `read_retain_log` gave.
        questions: (M,) questions of the forget split, in row order.
        answers: (M,) true answers.
        split: name of the forget split, such as "forget10".

    Returns:
        (M,) geometric R, float64.

    Raises:
        UserError: another split, other rows or other texts; the message names the first that differs.
    """
    advice = f"score the retrained model on all of {split} and pass that log"
    start = f"retrained model's log {log.source}: expected"
    if log.split is not None and log.split != split:
        raise UserError(f"{start} the split {split}, got {log.split}: {advice}")
    different = set(log.truth_ratio) ^ set(range(len(questions)))
    if different:
        side = "is missing from" if min(different) not in log.truth_ratio else "is only in"
        raise UserError(
            f"{start} the {len(questions)} rows of {split}, got {len(log.truth_ratio)}, row {min(different)} "
            f"{side} the log: {advice}"
        )
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        held = log.questions.get(row)
        if held is not None and squeeze(question) not in squeeze(held):
            raise UserError(f"{start} the question {question!r} at row {row}, got {held!r}: {advice}")
        held = log.answers.get(row)
        if held is not None and squeeze(answer) != squeeze(held):
            raise UserError(f"{start} the answer {answer!r} at row {row}, got {held!r}: {advice}")
    return torch.tensor([log.truth_ratio[row] for row in range(len(questions))], dtype=torch.float64)


def _parse(source: str, text: str) -> RetainLog:
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = [json.loads(line) for line in text.split("\n") if line.strip()]
    if isinstance(content, dict) and "index" not in content:
        if "eval_log_forget.json" in content or "avg_paraphrased_loss" in content:
            return _parse_tofu(source, content.get("eval_log_forget.json", content))
        return _parse_open_unlearning(source, content.get("metrics", content), content.get("forget_split"))
    return parse_rows(source, content if isinstance(content, list) else [content])


def parse_rows(source: str, rows: list[dict[str, Any]]) -> RetainLog:
    """The forget split among rows in our own format.

    Args:
        source: Where they come from, for messages.
        rows: Objects of rows.jsonl, of any splits; without losses their geometric `truth_ratio` is taken.
    """
    own, holdout = ({int(r["index"]): r for r in rows if r["split"] == split} for split in ("forget", "holdout"))
    if len(own) + len(holdout) != sum(row["split"] in ("forget", "holdout") for row in rows):
        raise ValueError("a row index of the forget or holdout split occurs twice")
    split = next((row["forget_split"] for row in own.values() if "forget_split" in row), None)
    extras: dict[str, Any] = {
        "answers": {i: row["answer"] for i, row in own.items() if "answer" in row},
        "questions": {i: row["question"] for i, row in own.items() if "question" in row},
        "min_k": own_min_k(source, own, holdout),
    }
    if own and all("paraphrase_nll" not in row and "truth_ratio" in row for row in own.values()):
        return RetainLog(source, split, {i: float(row["truth_ratio"]) for i, row in own.items()}, **extras)
    # A log without wrong answers has no truth ratios; without Min-K% scores either, it is no use.
    rated = extras["min_k"] is None or any("perturbed_nll" in row for row in own.values())
    # Without a paraphrase the answer itself takes its place.
    right = {i: r["paraphrase_nll" if "paraphrase_nll" in r else "answer_nll"] for i, r in own.items() if rated}
    wrong = {i: row["perturbed_nll"] for i, row in own.items() if rated}
    return _retain_log(source, split, right, wrong, **extras)


def _parse_open_unlearning(source: str, metrics: dict[str, Any], split: str | None) -> RetainLog:
    rows = {k: by_index(v["value_by_index"]) for k, v in metrics.items() if "value_by_index" in v}
    texts = rows.get("forget_Q_A_ROUGE", {})
    values = {name: held.get("agg_value") for name, held in metrics.items()}
    extras: dict[str, Any] = {
        "answers": {i: row["ground_truth"] for i, row in texts.items() if "ground_truth" in row},
        "questions": {i: row["input"] for i, row in texts.items() if "input" in row},
        "values": {name: value for name, value in values.items() if isinstance(value, int | float)},
        "min_k": public_min_k(source, metrics.get("mia_min_k")),
    }
    if "forget_Q_A_PARA_Prob" in rows and "forget_Q_A_PERT_Prob" in rows:
        right, wrong = rows["forget_Q_A_PARA_Prob"], rows["forget_Q_A_PERT_Prob"]
        right, wrong = ({i: row["avg_loss"] for i, row in part.items()} for part in (right, wrong))
        return _retain_log(source, split, right, wrong, **extras)
    scores = rows["forget_Truth_Ratio" if "forget_Truth_Ratio" in rows else "forget_truth_ratio"]
    return RetainLog(source, split, {i: float(row["score"]) for i, row in scores.items()}, **extras)


def _parse_tofu(source: str, part: dict[str, Any]) -> RetainLog:
    # Each text is (prompt, generation, true answer).
    texts = by_index(part.get("generated_text", {}))
    return _retain_log(
        source,
        None,
        by_index(part["avg_paraphrased_loss"]),
        by_index(part["average_perturb_loss"]),
        answers={i: text[2] for i, text in texts.items()},
        questions={i: text[0] for i, text in texts.items()},
    )


def _retain_log(
    source: str, split: str | None, right: dict[int, float], wrong: dict[int, list[float]], **extras: Any
) -> RetainLog:
    ratios = {i: _truth_ratio(nll, wrong[i]) for i, nll in right.items()}
    if not ratios and extras.get("min_k") is None:
        raise ValueError("no row of the forget split")
    return RetainLog(source, split, ratios, right, wrong, **extras)


def _truth_ratio(right: float, wrong: list[float]) -> float:
    return F.truth_ratio(_tensor([right]), _tensor(wrong)[None]).item()


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
