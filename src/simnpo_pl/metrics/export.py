"""The export to open-unlearning's TOFU_EVAL.json, so that results can be compared with other people's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.membership import ATTACKS

Row = Mapping[str, Any]
PREFIXES = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


def open_unlearning_log(rows: list[dict[str, Any]], values: Mapping[str, float]) -> dict[str, Any]:
    """The content of open-unlearning's TOFU_EVAL.json for our metrics.

    A metric without any row is left out. Extraction strength keeps our 0 for a row whose last token is not even right,
    where the public code writes 1/n; truth ratios are not offset by its 1e-10.

    Args:
        rows: Objects of our rows.jsonl, of splits "forget", "retain", "real_authors" and "world_facts".
        values: Aggregates written as they are, such as "forget_quality" and "model_utility".

    Returns:
        Metric name to {"agg_value": ..., "value_by_index": {"0": {...}}}.
    """
    log: dict[str, Any] = {}
    for metric in _METRICS:
        for split in metric.splits:
            if held := _held(rows, split, metric):
                log[metric.name.format(PREFIXES[split])] = held
    for name in ATTACKS:
        attack = _Metric(name, ("forget", "holdout"), (name,), _score(name))
        splits = {split: _held(rows, split, attack) for split in attack.splits}
        if name in values and all(splits.values()):
            log[name] = {**splits, "auc": values[name], "agg_value": values[name]}
    return {**{name: {"agg_value": value} for name, value in values.items()}, **log}


def _held(rows: list[dict[str, Any]], split: str, metric: "_Metric") -> dict[str, Any]:
    """Mean and entries of a split's rows that have all that a metric needs; empty without such a row."""
    chosen = [row for row in rows if row["split"] == split and all(row.get(key) is not None for key in metric.needs)]
    entries = {str(row["index"]): metric.entry(row) for row in sorted(chosen, key=lambda row: row["index"])}
    scores = _tensor([next(iter(entry.values())) for entry in entries.values()])
    return {"agg_value": metric.mean(scores), "value_by_index": entries} if entries else {}


class _Metric(NamedTuple):
    """One metric of the export; the first value of an entry is the one that is averaged."""

    name: str
    splits: tuple[str, ...]
    needs: tuple[str, ...]
    entry: Callable[[Row], dict[str, Any]]
    mean: Callable[[Tensor], float] = lambda scores: scores.mean().item()


def _probability(key: str) -> Callable[[Row], dict[str, Any]]:
    return lambda row: {"prob": torch.exp(-_tensor(row[key])).tolist(), "avg_loss": row[key]}


def _ratio(key: str) -> Callable[[Row], dict[str, Any]]:
    return lambda row: {"score": F.truth_ratio(_tensor([row[key]]), _tensor(row["perturbed_nll"])[None]).item()}


def _choice(row: Row) -> dict[str, Any]:
    return {"prob": F.choice_probability(_tensor([row["answer_nll"]]), _tensor(row["perturbed_nll"])[None]).item()}


def _rouge(row: Row) -> dict[str, Any]:
    names = {"question": "input", "answer": "ground_truth"}
    keys = ("rougeL_recall", "rougeL_f1", "rouge1_recall", "question", "answer", "generation")
    return {names.get(key, key): row[key] for key in keys if row.get(key) is not None}


def _score(key: str, *others: str) -> Callable[[Row], dict[str, Any]]:
    return lambda row: {"score": row[key], **{other: row[other] for other in others}}


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


_ALL, _FORGET, _RETAIN, _CHOICE = tuple(PREFIXES), ("forget",), ("retain",), ("real_authors", "world_facts")
_PARA, _PERT, _TRUE = ("paraphrase_nll",), ("perturbed_nll",), ("answer_nll",)
_METRICS = (
    _Metric("{}_Q_A_Prob", _ALL, _TRUE, _probability("answer_nll")),
    _Metric("{}_Q_A_PARA_Prob", _FORGET + _RETAIN, _PARA, _probability("paraphrase_nll")),
    _Metric("{}_Q_A_PERT_Prob", _ALL, _PERT, _probability("perturbed_nll")),
    _Metric("{}_Q_A_Prob_normalised", _CHOICE, _TRUE + _PERT, _choice),
    _Metric("{}_truth_ratio", _FORGET, _PARA + _PERT, _ratio("paraphrase_nll"), F.forget_truth_ratio),
    _Metric("{}_Truth_Ratio", _RETAIN, _PARA + _PERT, _ratio("paraphrase_nll"), F.utility_truth_ratio),
    _Metric("{}_Truth_Ratio", _CHOICE, _TRUE + _PERT, _ratio("answer_nll"), F.utility_truth_ratio),
    _Metric("{}_Q_A_ROUGE", _ALL, ("rougeL_recall",), _rouge),
    _Metric("{}_Q_A_gibberish", _FORGET, ("fluency", "generation"), _score("fluency", "generation")),
    _Metric("exact_memorization", _FORGET, ("exact_memorization",), _score("exact_memorization")),
    _Metric("extraction_strength", _FORGET, ("extraction_strength",), _score("extraction_strength")),
)
