"""Figures of a report: the page, Markdown and papers show the same."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from simnpo_pl.metrics.titles import title_of
from simnpo_pl.report import robustness
from simnpo_pl.report.drawing import log_labels, plain, points, render, whole_numbers
from simnpo_pl.runs.record import Row, Run

PALETTE = ("#3b82c4", "#d9822b", "#3a9d5d", "#b5539c", "#c0504d", "#7a6cc7", "#4f9292", "#a88b2c")
"""Readable on white and on black; a run has the same color in every figure."""
GREY = "#8a8a8a"
"""Color of the start and retrained models."""
LINES = (":", "-", "--", "-.")
"""Of the learning rates of relearning, from low to high."""
MARKERS = {"random": "o", "retain": "s", "shortest": "^"}
"""Of the rows that were relearned."""
LOG10_005 = math.log10(0.05)
TRADE_OFFS = (
    ("model_utility", "forget_quality/log10_p"),
    ("knowmem_retain", "knowmem_forget"),
    ("retain/probability", "forget/probability"),
    ("retain/nll", "forget/nll"),
)
"""What was kept and what was forgotten; the first pair that a run has is drawn."""
CLOSE = 0.06
"""Epochs this much of the way apart are labeled apart."""
Points = Sequence[tuple[float, float]]


class Point(NamedTuple):
    epoch: int | None
    kept: float
    forgotten: float


class Gap(NamedTuple):
    """Where two empirical distribution functions differ most; `high - low` is the KS statistic."""

    at: float
    low: float
    high: float


def color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def path_of(run: Run, kept: str = TRADE_OFFS[0][0], forgotten: str = TRADE_OFFS[0][1]) -> list[Point]:
    """Two metrics after each evaluated epoch, those of the exported model last."""
    models = [*run.epochs, (run.record.get("exported_epoch"), run.metrics("final"))]
    found = [(epoch, metrics.get(kept), metrics.get(forgotten)) for epoch, metrics in models]
    return [Point(epoch, x, y) for epoch, x, y in found if x is not None and y is not None]


def truth_ratios(rows: Sequence[Row]) -> list[float]:
    """Finite truth ratios of the forget rows."""
    found = [row.get("truth_ratio") for row in rows if row["split"] == "forget"]
    return [value for value in found if value is not None and math.isfinite(value)]


def distribution(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Empirical distribution function: sorted values, and the share of values up to each."""
    return sorted(values), [(i + 1) / len(values) for i in range(len(values))]


def largest_gap(one: Sequence[float], other: Sequence[float]) -> Gap:
    """Where the distribution functions of two samples differ most.

    Example:
        >>> largest_gap([1.0, 2.0], [2.0, 3.0])
        Gap(at=1.0, low=0.0, high=0.5)
    """
    places = np.unique([*one, *other])
    shares = np.stack([np.searchsorted(np.sort(s), places, side="right") / len(s) for s in (one, other)])
    at = np.abs(shares[0] - shares[1]).argmax()
    return Gap(places[at].item(), *np.sort(shares[:, at]).tolist())


def weight_quantiles(rows: Sequence[Row], shares: Sequence[float] = (0.25, 0.5, 0.75)) -> dict[int, list[float]]:
    """Quantiles of the rows' gradient weights in each epoch."""
    by_epoch: dict[int, list[float]] = {}
    for row in rows:
        by_epoch.setdefault(row["epoch"], []).append(row["weight"])
    return {epoch: np.quantile(weights, shares).tolist() for epoch, weights in sorted(by_epoch.items())}


def _curve(axis: Any, name: str, places: Points, shade: str, line: str = "-", tip: str = "", **style: Any) -> None:
    """A line; with a `tip`, a format of x and y, also a marker at every point."""
    marker = style.get("marker", "o")
    if places:
        axis.plot(
            *zip(*places, strict=True),
            line,
            color=shade,
            label=plain(name),
            **{"linewidth": 1.4, "markersize": 4, **style},
        )
    if tip:
        points(axis, places, [f"{name}: {tip.format(*place)}" for place in places], marker, color=shade, markersize=4)


def _axis_title(name: str) -> str:
    if name == "forget_quality/log10_p":
        return "forget quality, log10 p-value"
    title = title_of(name)
    return f"{title.short}, {title.unit}" if title.unit else title.short


def _apart(path: Sequence[Point]) -> list[Point]:
    """Points that are far enough from the one before them to be labeled."""
    spans = [float(np.ptp(values)) or 1.0 for values in list(zip(*path, strict=True))[1:]]
    found = list(path[:1])
    for point in path[1:]:
        moved = [(new - old) / span for new, old, span in zip(point[1:], found[-1][1:], spans, strict=True)]
        if math.hypot(*moved) > CLOSE:
            found.append(point)
    return found


def _trade_off(axis: Any, runs: Sequence[Run]) -> None:
    pair = next((pair for pair in TRADE_OFFS if any(path_of(run, *pair) for run in runs)), None)
    if pair is None:
        return
    tip = f"{title_of(pair[0]).short} {{:.3g}}, {title_of(pair[1]).short} {{:.3g}}"
    for number, run in enumerate(runs):
        if path := path_of(run, *pair):
            shade = color(number)
            _curve(axis, run.name, [point[1:] for point in path], shade, tip=tip)
            axis.plot(*path[-1][1:], "o", markersize=10, markerfacecolor="none", color=shade)
            for point in _apart(path[:-1]):
                above = {"textcoords": "offset points", "xytext": (4, 4)}
                axis.annotate(str(point.epoch), point[1:], fontsize=7, color=shade, **above)
    for model, marker in (("start", "s"), ("retrained", "*")):
        # The retrained model against itself has p = 1. Runs of one start model have one start point.
        known = {"forget_quality/log10_p": 0.0} if model == "retrained" else {}
        found = [[{**known, **run.metrics(model)}.get(name) for name in pair] for run in runs if run.metrics(model)]
        places = list({(x, y) for x, y in found if x is not None and y is not None})
        points(axis, places, [f"{model} model: {tip.format(*place)}" for place in places], marker, color=GREY)
        if places:
            axis.plot([], [], marker, color=GREY, label=f"{model} model")
    if "forget_quality/log10_p" in pair:
        axis.axhline(LOG10_005, color=GREY, linewidth=0.8, linestyle="--", label="p = 0.05")
        for n, chance in {run.chance["n"]: run.chance["retrained"] for run in runs if run.chance}.items():
            low, high = math.log10(chance["q05"]), math.log10(chance["q95"])
            axis.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0, label=f"retrained anew, n = {n}")
    axis.set(xlabel=_axis_title(pair[0]), ylabel=_axis_title(pair[1]))
    if title_of(pair[0]).higher_is_better is False:
        axis.invert_xaxis()


def _truth_ratios(axis: Any, runs: Sequence[Run]) -> None:
    drawn: set[tuple[float, ...]] = set()
    for number, run in enumerate(runs):
        unlearned, retrained = truth_ratios(run.rows), truth_ratios(run.retrained_rows)
        for name, values, shade, line, width in (
            (run.name, unlearned, color(number), "-", 1.4),
            ("start model", truth_ratios(run.start_rows), GREY, ":", 1.4),
            ("retrained model", retrained, GREY, "-", 2.2),
        ):
            # Runs share start and retrained models.
            if tuple(values) not in drawn:
                places = list(zip(*distribution(values), strict=True))
                _curve(axis, name, places, shade, line, drawstyle="steps-post", linewidth=width)
            drawn.add(tuple(values))
        if retrained and unlearned:
            at, low, high = largest_gap(unlearned, retrained)
            _curve(axis, f"gap of {run.name}: {high - low:.2f}", [(at, low), (at, high)], color(number), ":")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="truth ratio R", ylabel="share of forget rows")
    log_labels(axis)


def _losses(axis: Any, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        for kind, line in (("forget", "-"), ("retain", ":")):
            places = [(step["step"], step[f"{kind}_loss"]) for step in run.history if f"{kind}_loss" in step]
            known = [(step, loss) for step, loss in places if loss is not None]
            _curve(axis, f"{run.name}, {kind}", known, color(number), line, linewidth=1)
    axis.set(xlabel="optimizer step", ylabel="loss")


def _weights(axis: Any, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        quartiles, shade = weight_quantiles(run.weights), color(number)
        if quartiles:
            low, median, high = zip(*quartiles.values(), strict=True)
            axis.fill_between(list(quartiles), low, high, color=shade, alpha=0.2, linewidth=0)
            places = list(zip(quartiles, median, strict=True))
            _curve(axis, run.name, places, shade, tip="epoch {:g}, median {:.3g}")
    whole_numbers(axis)
    axis.set(xlabel="epoch", ylabel="gradient weight")
    axis.set_ylim(bottom=0)


def _relearning(metric: str) -> Callable[[Any, Sequence[Run]], None]:
    def draw(axis: Any, runs: Sequence[Run]) -> None:
        for number, run in enumerate(runs):
            rates = sorted({attack["settings"]["lr"] for attack in run.relearned})
            for attack, role in product(run.relearned, ("epochs", "control")):
                settings, repeats = attack["settings"], attack["repeats"]
                known = [(epoch, value) for epoch, value in robustness.relearned(attack, metric, role).items() if value]
                name = f"{run.name}, {len(repeats[0]['rows'])} {settings['subset']}, lr {settings['lr']:g}"
                name += ", control" if role == "control" else ""
                places = [(epoch, value.mean) for epoch, value in known]
                shade = GREY if role == "control" else color(number)
                line = LINES[rates.index(settings["lr"]) % len(LINES)]
                marker = MARKERS.get(settings["subset"], "D")
                _curve(axis, name, places, shade, line, "epoch {:g}, {:.3g}", marker=marker)
                if known and len(repeats) > 1:
                    bars = [value.deviation for _, value in known]
                    axis.errorbar(*zip(*places, strict=True), bars, fmt="none", ecolor=shade, capsize=2)
        whole_numbers(axis)
        axis.set(xlabel="epoch of relearning", ylabel=_axis_title(metric))
        axis.set_ylim(bottom=0)

    return draw


def _quantized(axis: Any, runs: Sequence[Run]) -> None:
    names = list(dict.fromkeys(name for run in runs for name in run.quantized))
    bars = [
        (run, color(number), metric, hatch)
        for number, run in enumerate(runs)
        for metric, hatch in (("forget/probability", ""), ("model_utility", "//"))
        if any(metric in metrics for metrics in run.quantized.values())
    ]
    for place, (run, shade, metric, hatch) in enumerate(bars):
        label = f"{run.name}, {title_of(metric).short}"
        heights = [run.quantized.get(name, {}).get(metric) or 0.0 for name in names]
        left = [group + (place + 0.5) * 0.8 / len(bars) - 0.4 for group in range(len(names))]
        axis.bar(left, heights, 0.8 / len(bars), color=shade, hatch=hatch, edgecolor="white", label=plain(label))
    axis.set_xticks(range(len(names)), names)
    axis.set(xlabel="weights", ylabel="probability, utility")


def _leak(axis: Any, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        for sample in run.sampled:
            settings = sample["settings"]
            places = [(k, sample["prompts"]["any"][f"leak@{k}"]) for k in range(1, settings["k"] + 1)]
            name = f"{run.name}, temperature {settings['temperature']:g}, seed {settings['seed']}"
            _curve(axis, name, places, color(number), tip="k = {:g}, {:.3f}")
    whole_numbers(axis)
    axis.set(xlabel="k, sampled answers to a prompt", ylabel="share of rows with a right answer", ylim=(0, 1))


def _depth(axis: Any, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        for model, drops in run.record.get("depth", {}).get("layers", {}).items():
            style = {"shade": color(number), "line": ":" if model == "retrained" else "-"}
            _curve(axis, f"{run.name}, {model}", list(enumerate(drops)), **style, tip="layer {:g}, {:.3g}")
    whole_numbers(axis)
    axis.set(xlabel="layer", ylabel="drop of log-prob, nats per token")


class Figure(NamedTuple):
    """A figure by its file name."""

    id: str
    title: str
    caption: str
    draw: Callable[[Any, Sequence[Run]], None]


FIGURES = (
    Figure(
        "trade_off",
        "Forgotten against kept",
        "Each line is a run, the numbers are its epochs, the ring is the exported model. To the right more is kept. "
        "Upwards more is forgotten if the axis is forget quality, by which the retrained model has p = 1, or a loss; "
        "downwards if it is a probability or a score of the forget rows. Of models retrained with other seeds 90 % "
        "would score inside the grey band if their rows were drawn independently.",
        _trade_off,
    ),
    Figure(
        "truth_ratios",
        "Truth ratios on the forget rows",
        "Share of rows up to a truth ratio. Forget quality asks whether two of these curves could come from one "
        "distribution; the dotted line is the largest gap to the retrained model, the KS statistic.",
        _truth_ratios,
    ),
    Figure(
        "depth",
        "How deep it is gone",
        "What hidden states lack of the forgotten answers: put into the start model, layer by layer, those of the "
        "unlearned model should take off as much of the answers' log-prob as those of the retrained model, dotted. The "
        "Unlearning Depth Score is the share that they do, from 0 to 1.",
        _depth,
    ),
    Figure("losses", "Losses by optimizer step", "Before their weights, over the effective batch.", _losses),
    Figure(
        "weights",
        "Gradient weights by epoch",
        "How strongly the forget objective acts on a row: median over the forget rows, their middle half as a band. "
        "Near 1 for every row, the objective acts as plain gradient ascent.",
        _weights,
    ),
    Figure(
        "relearn_quality",
        "Relearning: forget quality",
        "The unlearned model is fine-tuned on part of the forget rows; a method whose forget quality stays up has "
        "hidden less. Bars are the standard deviation over random draws.",
        _relearning("forget_quality"),
    ),
    Figure(
        "relearning",
        "Relearning: probability of the forgotten answers",
        "The same attack; over all forget rows, the relearned ones included. Each line style is a learning rate, each "
        "marker a kind of rows; the control, the retrained model under the same attack, is grey.",
        _relearning("forget/probability"),
    ),
    Figure(
        "quantized",
        "After quantizing the weights",
        "Quantization may bring back what small changes of the weights had hidden.",
        _quantized,
    ),
    Figure(
        "leak",
        "Rows for which a sampled answer is right",
        "One answer may hide what several sampled ones show: leak@k, whether one of k answers to any prompt is right.",
        _leak,
    ),
)


def drawn(runs: Sequence[Run], kind: str) -> Iterator[tuple[Figure, bytes]]:
    """The figures that the runs have data for, as `svg`, `png` or `pdf`."""
    for figure in FIGURES:
        if content := render(figure.draw, runs, kind):
            yield figure, content
