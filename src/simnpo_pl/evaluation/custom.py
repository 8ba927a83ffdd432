"""Metrics that `--eval.metrics` adds to a benchmark."""

import inspect
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any

from simnpo_pl.evaluation.gradients import GRADIENT_NORM
from simnpo_pl.evaluation.plan import OF_GENERATED, Split
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.utils.errors import UserError

ONE_A_ROW = (*OF_GENERATED, GRADIENT_NORM)
"""Scores that only a row's first answer has."""


def add_metrics(splits: Sequence[Split], entries: Sequence[Mapping[str, Any]]) -> None:
    """Build metrics and give them to their splits.

    Args:
        splits: What the benchmark measures.
        entries: `class_path` and `split`; optional `name` and `init_args`.

    Raises:
        UserError: There is no such split or class, the class cannot be built, or its name is taken.
    """
    by_name = {split.name: split for split in splits}
    for entry in entries:
        path, where = entry["class_path"], f"--eval.metrics {entry['class_path']}"
        split = by_name.get(entry["split"])
        if split is None:
            raise UserError(f"{where}: no split {entry['split']!r}; this benchmark measures {', '.join(by_name)}")
        kind = _load(path, where)
        name = f"{split.name}/{entry.get('name') or re.sub(r'(?<!^)(?=[A-Z])', '_', kind.__name__).lower()}"
        if name in split.metrics:
            raise UserError(f"{where}: {name} is measured already; give this one another name")
        sizes = {"rows": len(split.texts)}
        if "kinds" in inspect.signature(kind).parameters and kind.feature not in ONE_A_ROW:
            sizes["kinds"] = split.kinds
        try:
            split.metrics[name] = kind(**sizes, **entry.get("init_args", {}))
        except Exception as error:
            given = ", ".join([*sizes, *entry.get("init_args", {})])
            raise UserError(f"{where}: cannot be built with {given} ({' '.join(str(error).split())})") from error


def _load(path: str, where: str) -> type[RowMetric]:
    try:
        kind = pkgutil.resolve_name(path)
    except Exception as error:
        raise UserError(f"{where}: no such class ({error}); give MODULE.CLASS of a module that Python finds") from error
    if not (isinstance(kind, type) and issubclass(kind, RowMetric)):
        raise UserError(f"{where}: expected a subclass of simnpo_pl.metrics.base.RowMetric, got {kind!r}")
    return kind
