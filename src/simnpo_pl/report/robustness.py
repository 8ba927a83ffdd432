"""What relearning, quantization and sampling bring back from an unlearned model, as tables and as curves."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from simnpo_pl.metrics import titles
from simnpo_pl.metrics.titles import number, title_of
from simnpo_pl.runs.record import Run
from simnpo_pl.utils import markdown

RELEARNED = ("forget_quality", "forget/probability")
QUANTIZED = (*RELEARNED, "forget/rouge", "model_utility", "retain/probability")


class Spread(NamedTuple):
    """Mean of a value over repeats, and its sample standard deviation; 0 for a single one."""

    mean: float
    deviation: float
    n: int

    def __str__(self) -> str:
        return f"{number(self.mean)} ± {number(self.deviation)}" if self.n > 1 else number(self.mean)


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


def relearned(attack: dict[str, Any], metric: str) -> dict[int, Spread | None]:
    """Epoch of a relearning attack to a metric after it, over the draws."""
    epochs = zip(*(repeat["epochs"] for repeat in attack["repeats"]), strict=True)
    return {draws[0]["epoch"]: spread([draw["metrics"].get(metric) for draw in draws]) for draws in epochs}


def relearning_table(runs: Sequence[Run]) -> str:
    """Relearning attacks as Markdown; a table for every number of epochs, learning rate and share of rows."""
    groups: dict[tuple[int, float, float], list[list[str]]] = {}
    for run in runs:
        for attack in run.relearned:
            settings, repeats = attack["settings"], attack["repeats"]
            trained = f"{len(repeats[0]['rows'])} {settings['subset']} rows"
            trained += f", {len(repeats)} draws" if len(repeats) > 1 else ""
            rows = groups.setdefault((settings["epochs"], settings["lr"], settings["share"]), [])
            for name in RELEARNED:
                cells = ["-" if value is None else str(value) for value in relearned(attack, name).values()]
                rows.append([run.name, run.method, trained, title_of(name).short, *cells])
    tables = []
    for (last, lr, share), rows in sorted(groups.items()):
        heads = ["run", "method", "relearned", "metric", *(f"epoch {epoch}" for epoch in range(last + 1))]
        title = f"Relearning {100 * share:g} % of the forget rows, lr {lr:g}, falling linearly to 0:"
        tables.append(f"{title}\n\n{markdown.table(heads, rows)}")
    return "\n\n".join(tables)


def quantized_table(runs: Sequence[Run]) -> str:
    """Metrics before and after the weights were quantized, as Markdown."""
    rows = [([run.name, run.method, name], metrics) for run in runs for name, metrics in run.quantized.items()]
    return titles.table(["run", "method", "weights"], rows, titles.measured((m for _, m in rows), QUANTIZED))


def leak_table(runs: Sequence[Run]) -> str:
    """Best of k sampled answers, as Markdown; for every power of two and the number of answers drawn."""
    drawn, rows = set(), []
    for run in runs:
        greedy = number(run.metrics("final").get("forget/rouge"))
        for sample in run.sampled:
            settings = sample["settings"]
            drawn.add(settings["k"])
            labels = [f"{settings['temperature']:g}", str(settings["seed"]), str(sample["n"]), greedy]
            rows.append(([run.name, run.method, *labels], sample["metrics"]))
    shown = sorted(drawn | {2**i for i in range(max(drawn).bit_length())})
    heads = ["run", "method", "temperature", "seed", "rows", "greedy"]
    return titles.table(heads, rows, [f"leak@{k}" for k in shown])
