"""Figures of a report: the page, Markdown and papers show the same. A docstring is a figure's title and caption."""

import ast
import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simnpo_pl.metrics.titles import title_of
from simnpo_pl.report import robustness
from simnpo_pl.report.drawing import STYLE, log_labels, plain, points
from simnpo_pl.runs.record import Row, Run, geometric_ratio

PALETTE = ("#3b82c4", "#d9822b", "#3a9d5d", "#b5539c", "#c0504d", "#7a6cc7", "#4f9292", "#a88b2c")
"""Readable on white and on black; a run has the same color in every figure."""
GREY = "#8a8a8a"
"""Color of the start and retrained models."""
LINES = (":", "-", "--", "-.")
"""Of the learning rates of relearning, from low to high."""
MARKERS = {"random": "o", "retain": "s", "shortest": "^"}
"""Of the rows that were relearned."""
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


def color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def path_of(run: Run, kept: str = TRADE_OFFS[0][0], forgotten: str = TRADE_OFFS[0][1]) -> list[Point]:
    """Two metrics after each evaluated epoch, those of the exported model last."""
    models = [*run.epochs, (run.record.get("exported_epoch"), run.metrics("final"))]
    found = [(epoch, metrics.get(kept), metrics.get(forgotten)) for epoch, metrics in models]
    return [Point(epoch, x, y) for epoch, x, y in found if x is not None and y is not None]


def _ratios(rows: Sequence[Row]) -> list[float]:
    """Of the forget rows that have one."""
    return [r for row in rows if row["split"] == "forget" and (r := geometric_ratio(row)) is not None]


def largest_gap(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Where the distribution functions of two samples differ most, and both there; they differ by the KS statistic."""
    places = np.unique([*one, *other])
    shares = np.stack([np.searchsorted(np.sort(s), places, side="right") / len(s) for s in (one, other)])
    at = np.abs(shares[0] - shares[1]).argmax()
    low, high = np.sort(shares[:, at]).tolist()
    return places[at].item(), low, high


def weight_quartiles(rows: Sequence[Row]) -> dict[int, list[float]]:
    """Of the rows' gradient weights in each epoch."""
    by_epoch: dict[int, list[float]] = {}
    for row in rows:
        by_epoch.setdefault(row["epoch"], []).append(row["weight"])
    return {epoch: np.quantile(weights, (0.25, 0.5, 0.75)).tolist() for epoch, weights in sorted(by_epoch.items())}


def _curve(axis: Any, name: str, places: Points, shade: str, line: str = "-", tip: str = "", **style: Any) -> None:
    """A line; with a `tip`, a format of x and y, also a marker at every point."""
    if places:
        axis.plot(*zip(*places, strict=True), line, color=shade, label=plain(name), markersize=4, **style)
    if tip:
        tips = [f"{name}: {tip.format(*place)}" for place in places]
        points(axis, places, tips, style.get("marker", "o"), color=shade, markersize=4)


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


def trade_off(axis: Any, runs: Sequence[Run]) -> None:
    """Forgotten against kept

    Each line is a run, the numbers are its epochs, the ring is the exported model. To the right more is kept.
    Upwards more is forgotten if the axis is forget quality, by which the retrained model has p = 1, or a loss;
    downwards if it is a probability or a score of the forget rows. Of models retrained with other seeds 90 % would
    score inside the grey band if their rows were drawn independently.
    """
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
        axis.axhline(math.log10(0.05), color=GREY, linewidth=0.8, linestyle="--", label="p = 0.05")
        chances = [run.record.get("forget_quality_chance") for run in runs]
        for n, chance in {one["n"]: one["retrained"] for one in chances if one}.items():
            low, high = math.log10(chance["q05"]), math.log10(chance["q95"])
            axis.axhspan(low, high, color=GREY, alpha=0.15, linewidth=0, label=f"retrained anew, n = {n}")
    axis.set(xlabel=_axis_title(pair[0]), ylabel=_axis_title(pair[1]))
    if title_of(pair[0]).higher_is_better is False:
        axis.invert_xaxis()


def truth_ratios(axis: Any, runs: Sequence[Run]) -> None:
    """Truth ratios on the forget rows

    Share of rows up to a truth ratio. Forget quality asks whether two of these curves could come from one
    distribution; the dotted line is the largest gap to the retrained model, the KS statistic.
    """
    drawn: set[tuple[float, ...]] = set()
    for number, run in enumerate(runs):
        unlearned, retrained = _ratios(run.rows), _ratios(run.retrained_rows)
        for name, values, shade, line, width in (
            (run.name, unlearned, color(number), "-", 1.4),
            ("start model", _ratios(run.start_rows), GREY, ":", 1.4),
            ("retrained model", retrained, GREY, "-", 2.2),
        ):
            # Runs share start and retrained models.
            if values and tuple(values) not in drawn:
                axis.ecdf(values, color=shade, linestyle=line, linewidth=width, label=plain(name))
            drawn.add(tuple(values))
        if retrained and unlearned:
            at, low, high = largest_gap(unlearned, retrained)
            _curve(axis, f"gap of {run.name}: {high - low:.2f}", [(at, low), (at, high)], color(number), ":")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="truth ratio R", ylabel="share of forget rows")
    log_labels(axis)


def losses(axis: Any, runs: Sequence[Run]) -> None:
    """Losses by optimizer step

    Before their weights, over the effective batch.
    """
    for number, run in enumerate(runs):
        for kind, line in (("forget", "-"), ("retain", ":")):
            steps = [(step["step"], step.get(f"{kind}_loss")) for step in run.history]
            known = [(step, loss) for step, loss in steps if loss is not None]
            _curve(axis, f"{run.name}, {kind}", known, color(number), line, linewidth=1)
    axis.set(xlabel="optimizer step", ylabel="loss")


def weights(axis: Any, runs: Sequence[Run]) -> None:
    """Gradient weights by epoch

    How strongly the forget objective acts on a row: median over the forget rows, their middle half as a band. Near
    1 for every row, the objective acts as plain gradient ascent.
    """
    for number, run in enumerate(runs):
        quartiles, shade = weight_quartiles(run.weights), color(number)
        if quartiles:
            low, median, high = zip(*quartiles.values(), strict=True)
            axis.fill_between(list(quartiles), low, high, color=shade, alpha=0.2, linewidth=0)
            places = list(zip(quartiles, median, strict=True))
            _curve(axis, run.name, places, shade, tip="epoch {:g}, median {:.3g}")
    axis.locator_params(axis="x", integer=True)
    axis.set(xlabel="epoch", ylabel="gradient weight", ylim=(0, None))


def relearn_quality(axis: Any, runs: Sequence[Run]) -> None:
    """Relearning: forget quality

    The unlearned model is fine-tuned on part of the forget rows; a method whose forget quality stays up has hidden
    less. Bars are the standard deviation over random draws.
    """
    _relearning(axis, runs, "forget_quality")


def relearning(axis: Any, runs: Sequence[Run]) -> None:
    """Relearning: probability of the forgotten answers

    The same attack; over all forget rows, the relearned ones included. Each line style is a learning rate, each
    marker a kind of rows; the control, the retrained model under the same attack, is grey.
    """
    _relearning(axis, runs, "forget/probability")


def _relearning(axis: Any, runs: Sequence[Run], metric: str) -> None:
    for number, run in enumerate(runs):
        rates = sorted({attack["settings"]["lr"] for attack in run.relearned})
        for attack, role in product(run.relearned, ("epochs", "control")):
            settings, repeats = attack["settings"], attack["repeats"]
            known = [(epoch, value) for epoch, value in robustness.relearned(attack, metric, role).items() if value]
            name = f"{run.name}, {robustness.kind_of(attack)}, lr {settings['lr']:g}"
            name += ", control" if role == "control" else ""
            places = [(epoch, value.mean) for epoch, value in known]
            shade = GREY if role == "control" else color(number)
            line = LINES[rates.index(settings["lr"]) % len(LINES)]
            marker = MARKERS.get(settings["subset"], "D")
            _curve(axis, name, places, shade, line, "epoch {:g}, {:.3g}", marker=marker)
            if known and len(repeats) > 1:
                bars = [value.deviation for _, value in known]
                axis.errorbar(*zip(*places, strict=True), bars, fmt="none", ecolor=shade, capsize=2)
    axis.locator_params(axis="x", integer=True)
    axis.set(xlabel="epoch of relearning", ylabel=_axis_title(metric), ylim=(0, None))


def quantized(axis: Any, runs: Sequence[Run]) -> None:
    """After quantizing the weights

    Quantization may bring back what small changes of the weights had hidden.
    """
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


def leak(axis: Any, runs: Sequence[Run]) -> None:
    """Rows for which a sampled answer is right

    One answer may hide what several sampled ones show: leak@k, whether one of k answers to any prompt is right.
    """
    for number, run in enumerate(runs):
        for sample in run.sampled:
            settings = sample["settings"]
            places = [(k, sample["prompts"]["any"][f"leak@{k}"]) for k in range(1, settings["k"] + 1)]
            name = f"{run.name}, temperature {settings['temperature']:g}, seed {settings['seed']}"
            _curve(axis, name, places, color(number), tip="k = {:g}, {:.3f}")
    axis.locator_params(axis="x", integer=True)
    axis.set(xlabel="k, sampled answers to a prompt", ylabel="share of rows with a right answer", ylim=(0, 1))


def depth(axis: Any, runs: Sequence[Run]) -> None:
    """How deep it is gone

    What hidden states lack of the forgotten answers: put into the start model, layer by layer, those of the
    unlearned model should take off as much of the answers' log-prob as those of the retrained model, dotted. The
    Unlearning Depth Score is the share that they do, from 0 to 1.
    """
    for number, run in enumerate(runs):
        for model, drops in run.record.get("depth", {}).get("layers", {}).items():
            style = {"shade": color(number), "line": ":" if model == "retrained" else "-"}
            _curve(axis, f"{run.name}, {model}", list(enumerate(drops)), **style, tip="layer {:g}, {:.3g}")
    axis.locator_params(axis="x", integer=True)
    axis.set(xlabel="layer", ylabel="drop of log-prob, nats per token")


FIGURES = (trade_off, truth_ratios, depth, losses, weights, relearn_quality, relearning, quantized, leak)


def drawn(runs: Sequence[Run], kind: str) -> Iterator[tuple[str, str, str, bytes]]:
    """Name, title, caption and content, as `svg`, `png` or `pdf`, of the figures that the runs have data for."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Python leaves docstrings out under -OO.
    defined = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    texts = {one.name: ast.get_docstring(one) or "" for one in defined if isinstance(one, ast.FunctionDef)}
    # The same run gives the same file.
    undated = {"svg": {"Date": None, "Creator": None, "Format": None, "Type": None}, "pdf": {"CreationDate": None}}
    for draw in FIGURES:
        # Read on a phone, too.
        with rc_context({**STYLE, "font.size": 9, "lines.linewidth": 1.4}):
            figure = Figure(figsize=(4.4, 3.4), dpi=200, layout="constrained")
            axis = figure.subplots()
            draw(axis, runs)
            if not axis.has_data():
                continue
            handles, labels = axis.get_legend_handles_labels()
            if labels:
                small = max(map(len, labels)) > 28
                figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=6 if small else 8)
            file = BytesIO()
            figure.savefig(file, format=kind, metadata=undated.get(kind), transparent=kind == "svg")
        title, _, caption = texts[draw.__name__].partition("\n\n")
        yield draw.__name__, title, " ".join(caption.split()), file.getvalue()
