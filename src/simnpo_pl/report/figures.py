"""Figures of a report in plotly's JSON: the page shows them, and `paper` draws the same curves with matplotlib."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from simnpo_pl.metrics.titles import title_of
from simnpo_pl.report import robustness
from simnpo_pl.runs.record import Row, Run

PALETTE = ("#3b82c4", "#d9822b", "#3a9d5d", "#b5539c", "#c0504d", "#7a6cc7", "#4f9292", "#a88b2c")
"""Readable on white and on black; a run has the same color in every figure."""
GREY = "#8a8a8a"
"""Color of the start and retrained models."""
LOG10_005 = math.log10(0.05)
Trace = dict[str, Any]
"""A curve in plotly's JSON."""


class Point(NamedTuple):
    label: str
    utility: float
    log10_p: float


class Gap(NamedTuple):
    """Where two empirical distribution functions differ most; `high - low` is the KS statistic."""

    at: float
    low: float
    high: float


def color(number: int) -> str:
    return PALETTE[number % len(PALETTE)]


def path_of(run: Run) -> list[Point]:
    """Model utility and log10 of forget quality after each evaluated epoch, those of the exported model last."""
    exported = run.record.get("exported_epoch")
    last = "final" if exported is None else f"exported, epoch {exported}"
    models = [*((f"epoch {epoch}", metrics) for epoch, metrics in run.epochs), (last, run.metrics("final"))]
    return [point for label, metrics in models if (point := _point(label, metrics))]


def _point(label: str, metrics: dict[str, float]) -> Point | None:
    utility, log10_p = metrics.get("model_utility"), metrics.get("forget_quality/log10_p")
    return None if utility is None or log10_p is None else Point(label, utility, log10_p)


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


def _figure(
    traces: Sequence[Trace], x: str, y: str, x_axis: dict | None = None, y_axis: dict | None = None, **layout: Any
) -> dict[str, Any]:
    """Curves that have points, with the axes' titles."""
    axes = {"xaxis": {"title": {"text": x}, **(x_axis or {})}, "yaxis": {"title": {"text": y}, **(y_axis or {})}}
    return {"data": [trace for trace in traces if trace["x"]], "layout": {**axes, **layout}}


def _curve(
    name: str,
    points: Sequence[tuple[float, float]],
    shade: str,
    hover: str,
    dash: str = "solid",
    width: float = 2,
    shape: str = "linear",
    **more: Any,
) -> Trace:
    """Curve through `(x, y)` points; `more` are further options of plotly's scatter."""
    places = {"x": [x for x, _ in points], "y": [y for _, y in points]}
    line = {"color": shade, "dash": dash, "width": width, "shape": shape}
    return {"type": "scatter", "mode": "lines", "name": name, **places, "line": line, "hovertemplate": hover, **more}


def _path(name: str, points: Sequence[Point], shade: str, mode: str, marker: dict[str, Any]) -> Trace:
    hover = "%{text}<br>utility %{x:.3f}<br>log10 p %{y:.2f}"
    labels, places = [point.label for point in points], [point[1:] for point in points]
    return _curve(name, places, shade, hover, width=1.5, mode=mode, text=labels, marker=marker)


def _trade_off(runs: Sequence[Run]) -> dict[str, Any]:
    traces = []
    for number, run in enumerate(runs):
        if points := path_of(run):
            before = len(points) - 1
            ring = {"size": [7] * before + [14], "line": {"width": [0] * before + [2], "color": GREY}}
            traces.append(_path(run.name, points, color(number), "lines+markers", ring))
    for model, symbol in (("start", "circle-open"), ("retrained", "star")) if traces else ():
        # The retrained model against itself has p = 1. Runs of one start model have one start point.
        known = {"forget_quality/log10_p": 0.0} if model == "retrained" else {}
        found = [_point(f"{model} model, {run.name}", {**run.metrics(model), **known}) for run in reversed(runs)]
        points = list({point[1:]: point for point in found if point}.values())
        marker = {"size": 13, "symbol": symbol, "color": GREY, "line": {"width": 2, "color": GREY}}
        traces.append(_path(f"{model} model", points, GREY, "markers", marker))
    style = {"dash": "dash", "width": 1, "color": GREY}
    p_005 = {"type": "line", "line": style, "xref": "paper", "x0": 0, "x1": 1, "y0": LOG10_005, "y1": LOG10_005}
    return _figure(traces, "model utility", "log10 forget quality", shapes=[p_005])


def _truth_ratios(runs: Sequence[Run]) -> dict[str, Any]:
    traces: dict[Any, Trace] = {}
    for number, run in enumerate(runs):
        unlearned, retrained = truth_ratios(run.rows), truth_ratios(run.retrained_rows)
        for name, values, shade, dash, width in (
            (run.name, unlearned, color(number), "solid", 2),
            ("start model", truth_ratios(run.start_rows), GREY, "dot", 2),
            ("retrained model", retrained, GREY, "solid", 3),
        ):
            # Runs share start and retrained models.
            points, hover = list(zip(*distribution(values), strict=True)), "R %{x:.3g}<br>share %{y:.2f}"
            traces.setdefault(tuple(values), _curve(name, points, shade, hover, dash, width, "hv"))
        if retrained and unlearned:
            at, low, high = largest_gap(unlearned, retrained)
            name, hover = f"gap of {run.name}: {high - low:.2f}", f"KS statistic {high - low:.3f}"
            traces[run.name] = _curve(name, [(at, low), (at, high)], color(number), hover, "dot")
    log, share = {"type": "log"}, {"range": [0, 1.02]}
    return _figure(list(traces.values()), "truth ratio R", "share of forget rows", log, share)


def _losses(runs: Sequence[Run]) -> dict[str, Any]:
    traces = []
    for number, run in enumerate(runs):
        for kind, dash in (("forget", "solid"), ("retain", "dot")):
            points = [(line["step"], line[f"{kind}_loss"]) for line in run.history if f"{kind}_loss" in line]
            traces.append(_curve(f"{run.name}, {kind}", points, color(number), "step %{x}<br>%{y:.4g}", dash, 1.5))
    return _figure(traces, "optimizer step", "loss")


def _weights(runs: Sequence[Run]) -> dict[str, Any]:
    traces = []
    for number, run in enumerate(runs):
        quartiles, shade = weight_quantiles(run.weights), color(number)
        low, median, high = ([(epoch, values[i]) for epoch, values in quartiles.items()] for i in range(3))
        edge: dict[str, Any] = {"width": 0, "showlegend": False, "hoverinfo": "skip", "legendgroup": run.name}
        traces.append(_curve("", low, shade, "", **edge))
        traces.append(_curve("", high, shade, "", fill="tonexty", fillcolor=f"{shade}33", **edge))
        hover = "epoch %{x}<br>median %{y:.3g}"
        traces.append(_curve(run.name, median, shade, hover, mode="lines+markers", legendgroup=run.name))
    return _figure(traces, "epoch", "gradient weight", None, {"rangemode": "tozero"})


def _relearning(runs: Sequence[Run], metric: str) -> dict[str, Any]:
    traces = []
    for number, run in enumerate(runs):
        for attack in run.relearned:
            settings, repeats = attack["settings"], attack["repeats"]
            known = [(epoch, value) for epoch, value in robustness.relearned(attack, metric).items() if value]
            name = f"{run.name}, {len(repeats[0]['rows'])} {settings['subset']} rows, lr {settings['lr']:g}"
            dash = "dot" if settings["subset"] == "random" else "solid"
            bars = {"array": [value.deviation for _, value in known], "visible": len(repeats) > 1, "thickness": 1}
            points, hover = [(epoch, value.mean) for epoch, value in known], "epoch %{x}<br>%{y:.3g}"
            traces.append(_curve(name, points, color(number), hover, dash, mode="lines+markers", error_y=bars))
    title = title_of(metric).short
    return _figure(traces, "epoch of relearning", title, {"dtick": 1}, {"rangemode": "tozero"})


def _quantized(runs: Sequence[Run]) -> dict[str, Any]:
    traces = [
        {
            "type": "bar",
            "name": f"{run.name}, {title_of(name).short}",
            "x": list(run.quantized),
            "y": [metrics.get(name) for metrics in run.quantized.values()],
            "marker": {"color": color(number), "pattern": {"shape": shape}},
            "hovertemplate": "%{x}<br>%{y:.3g}",
        }
        for number, run in enumerate(runs)
        for name, shape in (("forget/probability", ""), ("model_utility", "/"))
        if any(name in metrics for metrics in run.quantized.values())
    ]
    return _figure(traces, "weights", "probability, utility", barmode="group")


def _leak(runs: Sequence[Run]) -> dict[str, Any]:
    traces = []
    for number, run in enumerate(runs):
        for sample in run.sampled:
            settings = sample["settings"]
            leaks = sample["prompts"]["any"]
            points = [(k, leaks[f"leak@{k}"]) for k in range(1, settings["k"] + 1)]
            name = f"{run.name}, temperature {settings['temperature']:g}, seed {settings['seed']}"
            traces.append(_curve(name, points, color(number), "k = %{x}<br>%{y:.3f}", mode="lines+markers"))
    return _figure(traces, "k, sampled answers to a prompt", "share of rows with a right answer")


def figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """`id`, `title` and `figure` (plotly's `data` and `layout`) of the figures that the runs have data for.

    Captions are in the page's template, by id.
    """
    made = {
        "trade-off": ("Forget quality against model utility", _trade_off(runs)),
        "truth-ratios": ("Truth ratios on the forget rows", _truth_ratios(runs)),
        "losses": ("Losses by optimizer step", _losses(runs)),
        "weights": ("Gradient weights by epoch", _weights(runs)),
        "relearn-quality": ("Relearning: forget quality", _relearning(runs, "forget_quality")),
        "relearn-probability": (
            "Relearning: probability of the forgotten answers",
            _relearning(runs, "forget/probability"),
        ),
        "quantized": ("After quantizing the weights", _quantized(runs)),
        "leak": ("Rows for which a sampled answer is right", _leak(runs)),
    }
    return [{"id": name, "title": title, "figure": figure} for name, (title, figure) in made.items() if figure["data"]]
