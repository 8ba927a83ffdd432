"""What runs hold of relearning, quantisation and sampling, as tables and as series to draw."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from simnpo_pl.report import words
from simnpo_pl.runs.record import Run
from simnpo_pl.utils import markdown

RELEARNT = {"forget_quality": "forget quality", "forget/probability": "forget prob."}
MEASURED = {
    **RELEARNT,
    "forget/rouge": "forget ROUGE",
    "model_utility": "model utility",
    "retain/probability": "retain prob.",
}


class Spread(NamedTuple):
    """Mean of a value over repeats, and its sample standard deviation; 0 for a single one."""

    mean: float
    deviation: float
    n: int

    def __str__(self) -> str:
        shown = words.number(self.mean)
        return f"{shown} ± {words.number(self.deviation)}" if self.n > 1 else shown


class Curve(NamedTuple):
    """A relearning attack on a run."""

    run: Run
    settings: dict[str, Any]
    rows: int
    epochs: list[int]
    values: dict[str, list[Spread | None]]
    """Metric to its value after each epoch; None where it was not measured."""

    @property
    def draws(self) -> int:
        """Repeats."""
        return max((value.n for values in self.values.values() for value in values if value is not None), default=0)


def spread(values: Sequence[float | None]) -> Spread | None:
    """Over the repeats that have a value.

    Example:
        >>> spread([1.0, 3.0, None])
        Spread(mean=2.0, deviation=1.4142135623730951, n=2)
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0, len(known))


def relearning(runs: Sequence[Run]) -> list[Curve]:
    """All relearning attacks on these runs; those of the same settings one after the other."""
    curves = []
    for run in runs:
        for entry in run.record.get("relearn", {}).values():
            repeats = entry["repeats"]
            points = [[epoch["metrics"] for epoch in repeat["epochs"]] for repeat in repeats]
            values = {
                name: [spread([metrics.get(name) for metrics in epoch]) for epoch in zip(*points, strict=True)]
                for name in RELEARNT
            }
            epochs = [epoch["epoch"] for epoch in repeats[0]["epochs"]]
            curves.append(Curve(run, entry["settings"], len(repeats[0]["rows"]), epochs, values))
    return sorted(curves, key=lambda c: (c.settings["epochs"], c.settings["lr"], c.settings["share"]))


def relearning_table(runs: Sequence[Run]) -> str:
    """Relearning attacks as Markdown; a table for every number of epochs and learning rate."""
    curves = relearning(runs)
    if not curves:
        return "no relearning attack on these runs"
    parts = []
    for key in dict.fromkeys((c.settings["epochs"], c.settings["lr"], c.settings["share"]) for c in curves):
        group = [c for c in curves if (c.settings["epochs"], c.settings["lr"], c.settings["share"]) == key]
        heads = ["run", "method", "relearnt", "metric", *(f"epoch {epoch}" for epoch in group[0].epochs)]
        lines = []
        for curve in group:
            draws = f", {curve.draws} draws" if curve.draws > 1 else ""
            relearnt = f"{curve.rows} {curve.settings['subset']} rows{draws}"
            for name, title in RELEARNT.items():
                cells = ["-" if value is None else str(value) for value in curve.values[name]]
                lines.append([curve.run.name, words.method(curve.run), relearnt, title, *cells])
        share = f"{100 * key[2]:g} % of the forget rows"
        parts.append(f"Relearning {share}, lr {key[1]:g}, falling linearly to 0:\n\n{markdown.table(heads, lines)}")
    return "\n\n".join(parts)


def quantized_table(runs: Sequence[Run]) -> str:
    """Metrics before and after the weights were rounded, as Markdown."""
    models = [
        (run, name, metrics)
        for run in runs
        if run.record.get("quantized")
        for name, metrics in [
            ("as exported", run.metrics("final")),
            *((key, entry["metrics"]) for key, entry in run.record["quantized"].items()),
        ]
    ]
    if not models:
        return "no quantised evaluation of these runs"
    known = [column for column in MEASURED if any(column in metrics for _, _, metrics in models)]
    cells = [
        [run.name, words.method(run), n, *(words.number(metrics.get(c)) for c in known)] for run, n, metrics in models
    ]
    return markdown.table(["run", "method", "weights", *(MEASURED[column] for column in known)], cells)


def leak_table(runs: Sequence[Run]) -> str:
    """Best of k sampled answers, as Markdown."""
    found = [(run, entry) for run in runs for entry in run.record.get("leak", {}).values()]
    if not found:
        return "no sampled answers of these runs"
    most = max(entry["settings"]["k"] for _, entry in found)
    shown = sorted({2**i for i in range(most.bit_length())} | {entry["settings"]["k"] for _, entry in found})
    heads = ["run", "method", "temperature", "seed", "rows", "greedy", *(f"leak@{k}" for k in shown)]
    lines = []
    for run, entry in found:
        settings, metrics = entry["settings"], entry["metrics"]
        cells = [run.name, words.method(run), f"{settings['temperature']:g}", str(settings["seed"]), str(entry["n"])]
        cells += [words.number(run.metrics("final").get("forget/rouge"))]
        lines.append([*cells, *(words.number(metrics.get(f"leak@{k}")) for k in shown)])
    return markdown.table(heads, lines)
