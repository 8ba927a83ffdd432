"""Interactive figures of what runs withstand: relearning, quantisation, sampling."""

from collections.abc import Sequence

import plotly.graph_objects as go

from simnpo_pl.report import robustness
from simnpo_pl.report.palette import colour
from simnpo_pl.runs.record import Run

DASHES = {"shortest": "solid", "random": "dot"}


def relearning(runs: Sequence[Run], metric: str) -> go.Figure | None:
    """A metric of the forget rows after each epoch of relearning; bars are the deviation over draws.

    Args:
        runs: In the order of their colours.
        metric: Key of `robustness.RELEARNT`.
    """
    figure = go.Figure()
    for curve in robustness.relearning(runs):
        values = curve.values[metric]
        known = [(epoch, value) for epoch, value in zip(curve.epochs, values, strict=True) if value is not None]
        if not known:
            continue
        settings = curve.settings
        figure.add_scatter(
            x=[epoch for epoch, _ in known],
            y=[value.mean for _, value in known],
            error_y={"array": [value.deviation for _, value in known], "visible": curve.draws > 1, "thickness": 1},
            name=f"{curve.run.name}, {curve.rows} {settings['subset']} rows, lr {settings['lr']:g}",
            mode="lines+markers",
            line={"color": colour(runs.index(curve.run)), "dash": DASHES[settings["subset"]], "width": 2},
            hovertemplate="epoch %{x}<br>%{y:.3g}",
        )
    if not figure.data:
        return None
    return figure.update_layout(
        xaxis={"title": {"text": "epoch of relearning"}, "dtick": 1},
        yaxis={"title": {"text": robustness.RELEARNT[metric]}, "rangemode": "tozero"},
    )


def quantized(runs: Sequence[Run]) -> go.Figure | None:
    """Forget probability and model utility as exported and after rounding the weights."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        rounded = run.record.get("quantized", {})
        if not rounded:
            continue
        models = {"as exported": run.metrics("final"), **{key: entry["metrics"] for key, entry in rounded.items()}}
        for metric, shape in (("forget/probability", ""), ("model_utility", "/")):
            if any(metric in metrics for metrics in models.values()):
                figure.add_bar(
                    x=list(models),
                    y=[metrics.get(metric) for metrics in models.values()],
                    name=f"{run.name}, {robustness.MEASURED[metric]}",
                    marker={"color": colour(number), "pattern": {"shape": shape}},
                    hovertemplate="%{x}<br>%{y:.3g}",
                )
    if not figure.data:
        return None
    return figure.update_layout(
        barmode="group", xaxis={"title": {"text": "weights"}}, yaxis={"title": {"text": "probability, utility"}}
    )


def leak(runs: Sequence[Run]) -> go.Figure | None:
    """Expected best ROUGE of k sampled answers."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        for entry in run.record.get("leak", {}).values():
            counts = range(1, entry["settings"]["k"] + 1)
            figure.add_scatter(
                x=list(counts),
                y=[entry["metrics"][f"leak@{k}"] for k in counts],
                name=f"{run.name}, temperature {entry['settings']['temperature']:g}, seed {entry['settings']['seed']}",
                mode="lines+markers",
                line={"color": colour(number), "width": 2},
                hovertemplate="k = %{x}<br>%{y:.3f}",
            )
    if not figure.data:
        return None
    return figure.update_layout(
        xaxis={"title": {"text": "k, sampled answers a row"}}, yaxis={"title": {"text": "ROUGE-L recall of the best"}}
    )
