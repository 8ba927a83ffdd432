"""A run in plain words, and the table of runs."""

from collections.abc import Sequence
from typing import NamedTuple

from simnpo_pl.metrics import titles
from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.report import robustness
from simnpo_pl.runs.record import Run
from simnpo_pl.runs.verdict import exported, neutral_prompts
from simnpo_pl.utils.errors import UserError

FORGOTTEN = (
    *("forget/probability", "verbmem_forget", "forget/nll", "forget1/distance"),
    *("forget/rouge", "knowmem_forget", "forget_quality"),
)
KEPT = (
    *("model_utility", "retain/probability", "knowmem_retain", "retain/nll", "retain/distance"),
    *("retain/rouge", "probe/nll"),
)
"""Metrics of the first two tiles; the first that was measured is shown large."""
TRUST = (
    "Which metric to trust: on 150 unlearned 1B models, faithfulness / robustness to relearning and rounding were "
    "0.971 / 0.933 for the Unlearning Depth Score (UDS), 0.891 / 0.859 for extraction strength (ES) and 0.947 / 0.379 "
    "for the truth ratio, on which forget quality rests (arXiv 2605.24614). Forget quality tells how alike answers are "
    "now, UDS and ES better what may come back."
)


class Tile(NamedTuple):
    title: str
    value: str
    lines: list[str]


def measured(runs: Sequence[Run], columns: Sequence[str] | None = None) -> list[str]:
    """Metrics that a model of one of the runs has a value of, or those of them that are named."""
    names = [*titles.TITLES, *dict.fromkeys(name for run in runs for name in run.record.get("titles", {}))]
    known = titles.measured((metrics for run in runs for metrics in run.models.values()), names)
    for name in columns or ():
        if name not in known:
            raise UserError(f"--columns {name}: not measured; known are {', '.join(known)}")
    return list(columns or known)


def model_name(run: Run, model: str) -> str:
    final = exported(run.record) if run.unlearned else "evaluated"
    return final if model == "final" else model


def method(run: Run) -> str:
    """What was done."""
    done = f"{run.method} ({run.settings}) on {run.trained}." if run.unlearned else "A model, evaluated."
    if run.temperature:
        done = f"{done} Metrics of {titles.answers_at(run.temperature)}."
    return done if run.record.get("finished") else f"{done} The run is not finished."


def summary(run: Run) -> str:
    """What was done, and the verdict; without one, the tiles in words."""
    if run.verdict:
        said = "; ".join([run.headline.capitalize(), *run.verdict["reasons"]])
    else:
        said = "; ".join(f"{tile.title}: {', '.join([tile.value, *tile.lines])}" for tile in tiles(run))
    return f"{method(run)} {said}."


def tiles(run: Run) -> list[Tile]:
    """What was forgotten, what was kept, and what attacks brought back."""
    recovered = run.recovered
    lines = _relearned(run) + [f"{name} {number(value)}" for name, value in recovered.items()]
    if run.untested:
        lines.append(f"{'not tested: ' if recovered else ''}{'; '.join(run.untested)}")
    worst = number(max(recovered.values())) if recovered else "not tested"
    return [_tile("Forgotten", run, FORGOTTEN), _tile("Kept", run, KEPT), Tile("May come back", worst, lines)]


def _relearned(run: Run) -> list[str]:
    """What relearning some of the forget rows did to the others, at its peak."""
    tried = [one for one in run.relearned if "outcome" in one and one["settings"]["subset"] in ("shortest", "random")]
    peaks = [(top, one) for one in tried if (top := robustness.peak([one], robustness.OTHERS))]
    if not peaks:
        return []
    top, one = max(peaks, key=lambda found: found[0])
    rows = len(one["repeats"][0]["rows"])
    return [f"{one['outcome']}: {number(top.before)} → {number(top.value)} after training on {rows} of the rows"]


def _tile(title: str, run: Run, names: Sequence[str]) -> Tile:
    start, final, retrained = (run.metrics(model) for model in ("start", "final", "retrained"))
    changes = []
    for name in names:
        if (now := final.get(name)) is not None:
            before, unseen = start.get(name), retrained.get(name)
            change = number(now) if before is None else f"{number(before)} → {number(now)}"
            compared = "" if unseen is None else f" (retrained model {number(unseen)})"
            of = neutral_prompts(run.record, name)
            changes.append((title_of(name).short + (of and f" of {of}"), change, compared))
    if not changes:
        return Tile(title, "not measured", [])
    (first, value, compared), *others = changes
    lines = [f"{short} {change}{compared}" for short, change, compared in others[:2]]
    return Tile(title, value, [first + compared, *lines])


def interval(run: Run, model: str, name: str) -> str:
    """95 % interval of a mean over rows, in brackets; empty if there is none."""
    low, high = run.intervals(model).get(name, (None, None))
    return "" if low is None else f"[{number(low)}, {number(high)}]"


def not_measured(runs: Sequence[Run]) -> list[str]:
    """A line for every reason: the metrics that it holds for, with the runs if these are not all."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        for name, reason in run.record.get("unavailable", {}).items():
            reasons.setdefault(reason, {}).setdefault(title_of(name).short, []).append(run.name)
    lines = []
    for reason, metrics in reasons.items():
        names = list(dict.fromkeys(name for found in metrics.values() for name in found))
        of = "" if len(names) == len(runs) else f" ({', '.join(names)})"
        lines.append(f"{', '.join(metrics)}{of}: {reason}")
    return lines
