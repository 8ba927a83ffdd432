"""Tables of the analyses, as Markdown."""

from collections.abc import Sequence

from simnpo_pl.report.words import number
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.analysis.halves import Half
from simnpo_pl.studies.analysis.weights import Correlation, metric_by_epoch, summaries
from simnpo_pl.utils.markdown import table


def weights(runs: Sequence[Run], epochs: Sequence[int]) -> str:
    """Gradient weights of each run by epoch, with their correlations."""
    heads = [
        "run",
        "epoch",
        "n",
        "weight: mean (least to most)",
        "r, answer length",
        "r, forget prob.",
        "r, difficulty",
    ]
    lines = []
    for run in runs:
        for s in summaries(run, epochs):
            spread = f"{number(s.mean)} ({number(s.low)} to {number(s.high)})"
            cells = [s.with_length, s.with_probability, s.with_difficulty]
            lines.append([run.name, str(s.epoch), str(s.with_length.n), spread, *map(_correlation, cells)])
    return table(heads, lines)


def by_epoch(runs: Sequence[Run], epochs: Sequence[int]) -> str:
    """Model utility and forget quality of each run by epoch, 0 for the start model."""
    heads = ["run", "epoch", "model utility", "forget quality"]
    lines = []
    for run in runs:
        utility, quality = (metric_by_epoch(run, name) for name in ("model_utility", "forget_quality"))
        for epoch in sorted({0, *epochs} & (utility.keys() | quality.keys())):
            lines.append([run.name, str(epoch), number(utility.get(epoch)), number(quality.get(epoch))])
    return table(heads, lines)


def models(runs: Sequence[tuple[str, Run, str]]) -> str:
    """Forget quality and utility of some models.

    Args:
        runs: What a model is called, its run, and which of the run's models it is.
    """
    columns = {
        "forget_quality": "forget quality",
        "forget_quality/ks_statistic": "KS",
        "model_utility": "model utility",
        "forget/probability": "forget prob.",
        "retain/probability": "retain prob.",
    }
    lines = []
    for name, run, model in runs:
        metrics = run.metrics(model)
        n = str(run.record.get("counts", {}).get("forget_quality", "-"))
        lines.append([name, n, *(number(metrics.get(column)) for column in columns)])
    return table(["model", "n", *columns.values()], lines)


def halves(found: dict[str, list[Half]]) -> str:
    """Forget quality and forget probability of each model on each half."""
    names = [half.name for half in next(iter(found.values()))]
    heads = ["model"]
    for name in names:
        heads += [f"{name} half: n", "forget quality", "KS", "forget prob."]
    lines = []
    for model, parts in found.items():
        line = [model]
        for half in parts:
            quality = half.quality
            line += [str(quality.n), *map(number, (quality.p_value, quality.ks_statistic, half.probability))]
        lines.append(line)
    return table(heads, lines)


def _correlation(found: Correlation | None) -> str:
    if found is None or found.r != found.r:
        return "-"
    return f"{found.r:.2f} (p {number(found.p)})"
