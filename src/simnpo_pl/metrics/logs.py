"""Logs of retrained models, which forget quality and PrivLeak compare with.

Such a model may have been scored by other code: four formats are read into our own rows, and a log of other rows, texts
or tokens is refused.
"""

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.membership import membership_auc
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json

LOG_NAMES = ("rows.jsonl", "TOFU_EVAL.json", "MUSE_EVAL.json", "eval_log_aggregated.json")
COMPARED = ("question", "answer", "forget_split", "tokens", "min_k_share", "mia_min_k", "truth_ratio")
"""What is kept of a row."""
AVERAGED = {
    "probability": "forget/probability",
    "rougeL_recall": "forget/rouge",
    **{name: f"forget/{name}" for name in ("extraction_strength", "exact_memorization", "verbatim", "degenerate")},
}
"""Scores of forget rows to the metric that is their mean."""
Row = dict[str, Any]


@dataclass(frozen=True)
class RetainLog:
    """A retrained model's scores of the forget and the holdout rows.

    Attributes:
        source: The file they were read from, or the model.
        kind: The project whose format the log has.
        splits: `forget` and `holdout`: row index to the log's values of `COMPARED`; truth ratios are geometric.
        auc: Area under the ROC curve of the Min-K% attack; None if the log has neither it nor the scores.
        metrics: Of the retrained model, as far as the log has them of every forget row.
    """

    source: str
    kind: str
    splits: dict[str, dict[int, Row]]
    auc: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """The rows in our own format; an AUC without its scores is a row of its own."""
        rows = [{"split": name, "index": i, **rows[i]} for name, rows in self.splits.items() for i in sorted(rows)]
        alone = self.auc is not None and not any("mia_min_k" in row for row in rows)
        return [*rows, {"split": "auc", "index": 0, "auc": self.auc}] if alone else rows

    def about(self) -> dict[str, Any]:
        """Source, format and number of rows, and whether the rows can be compared token by token."""
        counts = {name: len(rows) for name, rows in self.splits.items()}
        return {"source": self.source, "kind": self.kind, "rows": counts, "tokens_compared": self.has_tokens}

    @property
    def has_tokens(self) -> bool:
        """Whether every row holds the digest of its tokens."""
        rows = self.rows()
        return bool(rows) and all("tokens" in row for row in rows)

    def match(
        self, name: str, texts: Sequence[Mapping[str, Any]], tokens: Sequence[str], called: str | None = None
    ) -> list[Row]:
        """The rows of a split in order, if they are the rows of this evaluation.

        Texts and digests, see `Split.tokens`, are compared if the log holds them; texts without their whitespace, since
        public logs store cleaned-up text ("," for " ,") and questions inside a prompt template. A log's `forget_split`
        must be what the rows are `called`, such as "forget10".

        Raises:
            UserError: Another split, other rows, texts or tokens; the message names the first that differs.
        """
        rows = self.splits[name]
        problem = next(_differences(rows, texts, tokens, called or name, check_name=called is not None), None)
        if problem is not None:
            advice = f"score the retrained model on all of {called or name} with this evaluation's options and pass"
            raise UserError(f"retrained model's log {self.source}: expected {problem}: {advice} that log")
        return [rows[index] for index in range(len(texts))]


def _differences(
    rows: Mapping[int, Row], texts: Sequence[Mapping[str, Any]], tokens: Sequence[str], called: str, check_name: bool
) -> Iterator[str]:
    for row in rows.values():
        if check_name and row.get("forget_split", called) != called:
            yield f"the split {called}, got {row['forget_split']}"
    different = set(rows) ^ set(range(len(texts)))
    if different:
        side = "is missing from" if min(different) not in rows else "is only in"
        yield f"the {len(texts)} rows of {called}, got {len(rows)}, row {min(different)} {side} the log"
    for index, (text, digest) in enumerate(zip(texts, tokens, strict=True)):
        held, place = rows[index], f"row {index} of {called}"
        if "question" in held and _squeeze(text["question"]) not in _squeeze(held["question"]):
            yield f"the question {text['question']!r} at {place}, got {held['question']!r}"
        if "answer" in held and _squeeze(text["answer"]) != _squeeze(held["answer"]):
            yield f"the answer {text['answer']!r} at {place}, got {held['answer']!r}"
        if held.get("tokens", digest) != digest:
            yield (
                f"the tokens of this evaluation, got others at {place}, made with another prompt template, truncation "
                "or tokenizer"
            )


def read_retain_log(path: Path, convention: str = "geometric") -> RetainLog:
    """Read a retrained model's log of the forget rows.

    Recognizes by content: our `rows.jsonl`, open-unlearning's `TOFU_EVAL.json` and `MUSE_EVAL.json`, also under a key
    "metrics", and TOFU's `eval_log_aggregated.json` or its forget part; each may be gzipped. R is computed from the
    losses, the log's convention does not matter; without losses its scores are taken as geometric ratios.

    `path` is a log or its folder; for a run that unlearned, the retrained model's rows in it are read. The truth ratio
    among `RetainLog.metrics` is of the `convention`, which needs losses if it is not geometric.

    Raises:
        UserError: No such file, an unknown format, no score to compare with, or a log of a model that unlearned.
    """
    path = _comparator(Path(path))
    if not path.is_file():
        raise UserError(
            f"retrained model's log: expected a run folder or a log file, got no file at {path}: "
            "score the retrained model first and pass its run folder"
        )
    try:
        raw = path.read_bytes()
        found = _parse((gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode())
        log = parse_rows(str(path), *found, convention=convention)
        if log.auc is None and not any("truth_ratio" in row for row in log.splits["forget"].values()):
            raise ValueError("no truth ratio of a forget row and no Min-K% scores")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, EOFError) as error:
        raise UserError(
            f"retrained model's log: expected the content of {' or '.join(LOG_NAMES)}, got {path}, which "
            f"cannot be read as any of them ({error!r}): check that the file is complete"
        ) from error
    if not log.has_tokens:
        held = ["number", *(key for key in ("question", "answer") if any(key in row for row in log.rows()))]
        rank_zero_warn(
            f"retrained model's log {path} ({log.kind}) holds no digests of tokens: its rows are compared by "
            f"{', '.join(held)} only; check that prompt template, truncation and tokenizer were the same"
        )
    return log


def unlearning_run(folder: Path) -> Path | None:
    """The run that unlearned, among the run in a folder and those that its model came from; None if there is none."""
    seen: set[Path] = set()
    while (file := folder / "results.json").is_file() and folder not in seen:
        seen.add(folder)
        record = read_json(file)
        if not isinstance(record, dict) or "versions" not in record:
            break
        if record.get("objective", {}).get("name", "FineTune") != "FineTune":
            return folder
        model = Path(str(record.get("checkpoint") or record["settings"].get("model", {}).get("name"))).expanduser()
        if model.name not in ("model", "last.ckpt"):
            break
        folder = model.parent
    return None


def _comparator(path: Path) -> Path:
    """The file to read; for a run that unlearned, the rows of its retrained model."""
    folder = path if path.is_dir() else path.parent
    kept = folder / "retrained_rows.jsonl"
    unlearned = unlearning_run(folder) if path != kept else None
    if unlearned is not None:
        reason = f"retrained model's log {path}: the model it is of was unlearned in {unlearned}"
        if not kept.is_file():
            raise UserError(f"{reason}: pass the log of a model that was trained without the forget rows")
        rank_zero_warn(f"{reason}; the rows of the retrained model it was compared with are read, {kept}")
        return kept
    if path.is_dir():
        return next((path / name for name in LOG_NAMES if (path / name).is_file()), path / LOG_NAMES[0])
    return path


def parse_rows(
    source: str, rows: list[Row], kind: str = "simnpo_pl", auc: float | None = None, convention: str = "geometric"
) -> RetainLog:
    """The forget and holdout rows among objects of rows.jsonl, of any splits.

    Rows without losses have a geometric `truth_ratio`. `kind` is the project whose format they had; `auc`, of the
    Min-K% attack, is computed from the rows if None; `convention` is that of the truth ratio among the metrics.
    """
    auc = next((row["auc"] for row in rows if row["split"] == "auc"), auc)
    splits: dict[str, dict[int, Row]] = {"forget": {}, "holdout": {}}
    for row in rows:
        if (found := splits.get(row["split"])) is not None:
            if (index := int(row["index"])) in found:
                raise ValueError(f"row {index} of {row['split']} occurs twice")
            held = {key: row[key] for key in COMPARED if key in row}
            found[index] = held if (ratio := _truth_ratio(row)) is None else held | {"truth_ratio": ratio}
    scores = [[row.get("mia_min_k") for row in found.values()] for found in splits.values()]
    if auc is None and all(scores) and not any(None in values for values in scores):
        auc = membership_auc(*(_tensor(values) for values in scores))
    return RetainLog(source, kind, splits, auc, _metrics([row for row in rows if row["split"] == "forget"], convention))


def _metrics(forget: list[Row], convention: str) -> dict[str, float]:
    found = {name: [row[score] for row in forget if row.get(score) is not None] for score, name in AVERAGED.items()}
    metrics = {name: fmean(values) for name, values in found.items() if 0 < len(values) == len(forget)}
    ratios = _tensor([ratio for row in forget if (ratio := _truth_ratio(row, convention)) is not None])
    if 0 < len(ratios) == len(forget):
        ratios = ratios if convention == "prob_mean" else F.closeness(ratios)
        metrics["forget/truth_ratio"] = ratios.mean().item()
    return metrics


def _parse(text: str) -> tuple[list[Row], str, float | None]:
    """The rows, the project whose format they have, and the AUC of Min-K% if the log names it."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(content, dict) or "index" in content:
        return (content if isinstance(content, list) else [content]), "simnpo_pl", None
    if "eval_log_forget.json" in content or "avg_paraphrased_loss" in content:
        return _tofu_rows(content.get("eval_log_forget.json", content)), "TOFU", None
    metrics = content.get("metrics", content)
    rows = _open_unlearning_rows(metrics, content.get("forget_split"))
    return rows, "open-unlearning", (metrics.get("mia_min_k") or {}).get("auc")


def _open_unlearning_rows(metrics: dict[str, Any], split: str | None) -> list[Row]:
    rows: dict[tuple[str, int], dict[str, Any]] = {}

    def take(values: Any, name: str, keys: Mapping[str, str]) -> None:
        for index, entry in _by_index(values.get("value_by_index", {})).items():
            if entry is not None:
                held = entry if isinstance(entry, dict) else {"score": entry}
                row = rows.setdefault((name, index), {"split": name, "index": index})
                row |= {ours: held[theirs] for theirs, ours in keys.items() if theirs in held}
                row |= {"forget_split": split} if split is not None and name == "forget" else {}

    for metric, keys in (
        ("forget_truth_ratio", {"score": "truth_ratio"}),
        ("forget_Truth_Ratio", {"score": "truth_ratio"}),
        ("forget_Q_A_PARA_Prob", {"avg_loss": "paraphrase_nll"}),
        ("forget_Q_A_PERT_Prob", {"avg_loss": "perturbed_nll"}),
        ("forget_Q_A_ROUGE", {"input": "question", "ground_truth": "answer", "rougeL_recall": "rougeL_recall"}),
        ("forget_Q_A_Prob", {"prob": "probability"}),
    ):
        take(metrics.get(metric, {}), "forget", keys)
    attack = metrics.get("mia_min_k") or {}
    for name in ("forget", "holdout"):
        take(attack.get(name, {}), name, {"score": "mia_min_k"})
    return list(rows.values())


def _tofu_rows(forget: dict[str, Any]) -> list[Row]:
    # Each text is (prompt, generation, true answer).
    texts, wrong = _by_index(forget.get("generated_text", {})), _by_index(forget["average_perturb_loss"])
    rows = []
    for i, right in _by_index(forget["avg_paraphrased_loss"]).items():
        held = {"question": texts[i][0], "answer": texts[i][2]} if i in texts else {}
        rows.append({"split": "forget", "index": i, "paraphrase_nll": right, "perturbed_nll": wrong[i], **held})
    return rows


def _truth_ratio(row: Mapping[str, Any], convention: str = "geometric") -> float | None:
    """From the losses if the row holds them, else the geometric ratio that it has."""
    # Without a paraphrase the answer itself takes its place.
    right, wrong = row.get("paraphrase_nll", row.get("answer_nll")), row.get("perturbed_nll")
    if wrong is not None:
        return F.truth_ratio(_tensor(right).mean()[None], _tensor(wrong).reshape(1, -1), convention).item()
    if "truth_ratio" in row and convention == "geometric":
        return math.nan if row["truth_ratio"] is None else float(row["truth_ratio"])
    return None


def _by_index(values: Any) -> dict[int, Any]:
    """A list or an object with numbers as keys, by number."""
    return {int(i): v for i, v in (values.items() if isinstance(values, dict) else enumerate(values))}


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
