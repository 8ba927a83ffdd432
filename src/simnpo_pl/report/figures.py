"""Interactive figures of the page; colours of text and grid are the page's, which knows light from dark."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from simnpo_pl.report import attacks, series
from simnpo_pl.report.palette import GREY, colour
from simnpo_pl.runs.record import Run


def figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All figures that the runs have data for.

    Returns:
        `id`, `title`, `caption` and `figure` (plotly's `data` and `layout`) of each.
    """
    made = [
        (
            "trade-off",
            "Forget quality against model utility",
            "Each line is a run over its evaluated epochs; the ringed marker is the exported model. Up is forgotten, "
            "right is useful. The dashed line is p = 0.05; the retrained model is at p = 1 by definition.",
            trade_off(runs),
        ),
        (
            "truth-ratios",
            "Truth ratios on the forget rows",
            "Share of rows up to a truth ratio. Forget quality asks whether two of these curves could come from one "
            "distribution; the dotted line is the largest gap to the retrained model, the KS statistic.",
            truth_ratios(runs),
        ),
        ("losses", "Losses by optimizer step", "Before their weights, over the effective batch.", losses(runs)),
        (
            "weights",
            "Gradient weights by epoch",
            "How hard the forget objective pulls at a row: median over the forget rows, their middle half as a band. "
            "Near 1 whatever the row, the objective acts as plain gradient ascent.",
            weights(runs),
        ),
        (
            "relearn-quality",
            "Relearning: forget quality",
            "The unlearned model is fine-tuned on part of the forget rows; a method whose forget quality stays up has "
            "hidden less. Bars are the standard deviation over random draws.",
            attacks.relearning(runs, "forget_quality"),
        ),
        (
            "relearn-probability",
            "Relearning: probability of the forgotten answers",
            "The same attack; over all forget rows, those relearnt among them.",
            attacks.relearning(runs, "forget/probability"),
        ),
        (
            "quantized",
            "After rounding the weights",
            "Rounding may bring back what small changes of the weights had hidden.",
            attacks.quantized(runs),
        ),
        (
            "leak",
            "Best of k sampled answers",
            "Greedy answers may hide what sampled ones show: expected best overlap with the true answer among k.",
            attacks.leak(runs),
        ),
    ]
    return [
        {"id": key, "title": title, "caption": caption, "figure": figure.to_plotly_json()}
        for key, title, caption, figure in made
        if figure is not None
    ]


def trade_off(runs: Sequence[Run]) -> go.Figure | None:
    """log10 of forget quality against model utility, over epochs."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        points = series.path_of(run)
        if not points:
            continue
        sizes = [7] * (len(points) - 1) + [14]
        figure.add_scatter(
            x=[p.utility for p in points],
            y=[p.log10_p for p in points],
            text=[p.label for p in points],
            mode="lines+markers",
            name=run.name,
            marker={"size": sizes, "line": {"width": [0] * (len(points) - 1) + [2], "color": GREY}},
            line={"color": colour(number), "width": 1.5},
            hovertemplate="%{text}<br>utility %{x:.3f}<br>log10 p %{y:.2f}",
        )
    if not figure.data:
        return None
    for label, symbol, of in (("start", "circle-open", series.start_of), ("retrained", "star", series.retrained_of)):
        # Runs of one start model have one start point.
        known = {(p.utility, p.log10_p): run.name for run in reversed(runs) if (p := of(run)) is not None}
        if known:
            figure.add_scatter(
                x=[x for x, _ in known],
                y=[y for _, y in known],
                text=[f"{label} model, {name}" for name in known.values()],
                mode="markers",
                name=f"{label} model",
                marker={"size": 13, "symbol": symbol, "color": GREY, "line": {"width": 2, "color": GREY}},
                hovertemplate="%{text}<br>utility %{x:.3f}<br>log10 p %{y:.2f}",
            )
    figure.add_hline(y=-1.30103, line={"dash": "dash", "width": 1, "color": GREY})
    return figure.update_layout(
        xaxis={"title": {"text": "model utility"}}, yaxis={"title": {"text": "log10 forget quality"}}
    )


def truth_ratios(runs: Sequence[Run]) -> go.Figure | None:
    """Distribution functions of the truth ratios of start, retrained and unlearned models."""
    figure = go.Figure()
    drawn: set[tuple[float, ...]] = set()
    for number, run in enumerate(runs):
        retrained = series.truth_ratios(run.retrained_rows)
        curves = [
            (run.name, series.truth_ratios(run.rows), colour(number), "solid"),
            ("start model", series.truth_ratios(run.start_rows), GREY, "dot"),
            ("retrained model", retrained, GREY, "solid"),
        ]
        for name, values, shade, dash in curves:
            if values and tuple(values) not in drawn:
                drawn.add(tuple(values))
                x, y = series.distribution(values)
                width = 3 if name == "retrained model" else 2
                figure.add_scatter(
                    x=x,
                    y=y,
                    name=name,
                    mode="lines",
                    line={"color": shade, "dash": dash, "width": width, "shape": "hv"},
                    hovertemplate="R %{x:.3g}<br>share %{y:.2f}",
                )
        unlearned = curves[0][1]
        if retrained and unlearned:
            gap = series.largest_gap(unlearned, retrained)
            figure.add_scatter(
                x=[gap.at, gap.at],
                y=[gap.low, gap.high],
                name=f"gap of {run.name}: {gap.high - gap.low:.2f}",
                mode="lines",
                line={"color": colour(number), "dash": "dot", "width": 2},
                hovertemplate=f"KS statistic {gap.high - gap.low:.3f}",
            )
    if not figure.data:
        return None
    return figure.update_layout(
        xaxis={"title": {"text": "truth ratio R"}, "type": "log"},
        yaxis={"title": {"text": "share of forget rows"}, "range": [0, 1.02]},
    )


def losses(runs: Sequence[Run]) -> go.Figure | None:
    """Forget and retain loss over optimizer steps."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        for key, dash in (("forget_loss", "solid"), ("retain_loss", "dot")):
            known = [line for line in run.history if key in line]
            if known:
                figure.add_scatter(
                    x=[line["step"] for line in known],
                    y=[line[key] for line in known],
                    name=f"{run.name}, {key.split('_')[0]}",
                    mode="lines",
                    line={"color": colour(number), "dash": dash, "width": 1.5},
                    hovertemplate="step %{x}<br>%{y:.4g}",
                )
    if not figure.data:
        return None
    return figure.update_layout(
        xaxis={"title": {"text": "optimizer step"}}, yaxis={"title": {"text": "loss"}, "type": "linear"}
    )


def weights(runs: Sequence[Run]) -> go.Figure | None:
    """Median and quartiles of the gradient weights over epochs."""
    figure = go.Figure()
    for number, run in enumerate(runs):
        quartiles = series.weight_quartiles(run.weights)
        if not quartiles:
            continue
        epochs = [q.epoch for q in quartiles]
        band = {
            "mode": "lines",
            "line": {"width": 0},
            "legendgroup": run.name,
            "showlegend": False,
            "hoverinfo": "skip",
        }
        figure.add_scatter(x=epochs, y=[q.low for q in quartiles], **band)
        figure.add_scatter(
            x=epochs, y=[q.high for q in quartiles], fill="tonexty", fillcolor=colour(number) + "33", **band
        )
        figure.add_scatter(
            x=epochs,
            y=[q.median for q in quartiles],
            name=run.name,
            legendgroup=run.name,
            mode="lines+markers",
            line={"color": colour(number), "width": 2},
            hovertemplate="epoch %{x}<br>median %{y:.3g}",
        )
    if not figure.data:
        return None
    return figure.update_layout(
        xaxis={"title": {"text": "epoch"}}, yaxis={"title": {"text": "gradient weight"}, "rangemode": "tozero"}
    )
