"""Figures of the analyses, after the SimNPO paper's, as PNG files that read well in print."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simnpo_pl.report.series import distribution, largest_gap
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.analysis.halves import Half
from simnpo_pl.studies.analysis.weights import chosen_epochs, difficulty, metric_by_epoch, pearson, weights_by_epoch
from simnpo_pl.utils.errors import UserError

START = "start"
"""Name of the start model among others."""
LOG10_005 = -1.30103
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def check_installed() -> None:
    """See that figures can be drawn, before hours of runs.

    Raises:
        UserError: A library is missing.
    """
    for name in ("matplotlib", "plotly"):
        if find_spec(name) is None:
            raise UserError(f"figures need {name}: pip install 'simnpo_pl[report]'")


@contextmanager
def _panels(
    file: Path, rows: int, columns: int, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Figure and its axes `(rows, columns)`, saved when they have been drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        shape = (size[0] * columns, size[1] * rows)
        figure, axes = plt.subplots(
            rows, columns, figsize=shape, dpi=200, layout="constrained", squeeze=False, **options
        )
        try:
            yield figure, axes
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file)
        finally:
            plt.close(figure)


def weight_against_length(runs: Sequence[Run], epochs: Sequence[int], file: Path) -> None:
    """Gradient weight of every forget row against its answer's length, a row of panels a run (figure 3)."""
    from simnpo_pl.report.figures import colour

    chosen = [chosen_epochs(run, epochs) for run in runs]
    with _panels(file, len(runs), max(map(len, chosen)), (1.9, 1.8), sharex=True, sharey="row") as (figure, axes):
        for number, run in enumerate(runs):
            by_epoch = weights_by_epoch(run)
            for column, axis in enumerate(axes[number]):
                if column >= len(chosen[number]):
                    axis.set_axis_off()
                    continue
                rows = by_epoch[chosen[number][column]]
                lengths, weights = [row["length"] for row in rows], [row["weight"] for row in rows]
                axis.scatter(lengths, weights, s=9, alpha=0.55, linewidths=0, color=colour(number))
                axis.set_title(f"epoch {chosen[number][column]}: r = {pearson(lengths, weights).r:.2f}")
            _from_zero(axes[number][0], [row["weight"] for row in run.weights])
            axes[number][0].set_ylabel(f"{run.name}\ngradient weight")
        figure.supxlabel("answer length n, tokens", fontsize=8)


def weight_by_epoch(runs: Sequence[Run], file: Path) -> None:
    """Median and range of the gradient weights over epochs; ranges hold the middle 80 % of the rows."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    from simnpo_pl.report.figures import colour

    with _panels(file, 1, len(runs), (2.6, 2.0)) as (_, axes):
        for number, (run, axis) in enumerate(zip(runs, axes[0], strict=True)):
            by_epoch = weights_by_epoch(run)
            low, middle, high = np.array(
                [np.quantile([row["weight"] for row in rows], (0.1, 0.5, 0.9)) for rows in by_epoch.values()]
            ).T
            axis.fill_between(list(by_epoch), low, high, color=colour(number), alpha=0.25, linewidth=0)
            axis.plot(list(by_epoch), middle, ".-", color=colour(number), linewidth=1.2, markersize=4)
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(run.name)
            axis.set_xlabel("epoch")
        axes[0][0].set_ylabel("gradient weight")


def quality_by_epoch(runs: Sequence[Run], file: Path) -> None:
    """Model utility and log10 of forget quality of the start model, at 0, and after every evaluated epoch."""
    from matplotlib.ticker import MaxNLocator

    from simnpo_pl.report.figures import GREY, colour

    titles = {"model_utility": "model utility", "forget_quality/log10_p": "log10 forget quality"}
    with _panels(file, 1, 2, (2.6, 2.0)) as (_, axes):
        for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
            for number, run in enumerate(runs):
                points = metric_by_epoch(run, key)
                axis.plot(
                    list(points), list(points.values()), ".-", color=colour(number), label=run.name, linewidth=1.2
                )
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_title(title)
            axis.set_xlabel("epoch")
        axes[0][1].axhline(LOG10_005, color=GREY, linewidth=0.8, linestyle="--")
        axes[0][0].legend(fontsize=6)


def weight_against_knowledge(runs: Sequence[Run], epochs: Sequence[int], file: Path) -> None:
    """Gradient weight against the present forget probability, and against the start model's loss (difficulty)."""
    from matplotlib import colormaps

    with _panels(file, len(runs), 2, (3.1, 2.0), sharex="col", sharey="row") as (_, axes):
        for number, run in enumerate(runs):
            by_epoch, hard = weights_by_epoch(run), difficulty(run)
            chosen = chosen_epochs(run, epochs)
            for place, epoch in enumerate(chosen):
                rows = by_epoch[epoch]
                weights = [row["weight"] for row in rows]
                sides = [[row["probability"] for row in rows]]
                if hard is not None:
                    sides.append([hard[row["index"]] for row in rows])
                shade = colormaps["viridis"](0.9 * place / max(len(chosen) - 1, 1))
                for axis, side in zip(axes[number], sides, strict=False):
                    label = f"{epoch}: r = {pearson(side, weights).r:.2f}"
                    axis.scatter(side, weights, label=label, s=9, alpha=0.6, linewidths=0, color=shade)
            axes[number][0].set_ylabel(f"{run.name}\ngradient weight")
            _from_zero(axes[number][0], [row["weight"] for row in run.weights])
            for axis in axes[number][: 1 if hard is None else 2]:
                axis.legend(
                    title="epoch",
                    loc="upper left",
                    bbox_to_anchor=(1, 1),
                    fontsize=6,
                    title_fontsize=6,
                    handletextpad=0,
                )
            if hard is None:
                axes[number][1].text(
                    0.5, 0.5, "start model not measured", ha="center", transform=axes[number][1].transAxes
                )
        axes[-1][0].set_xlabel("forget probability at that epoch")
        axes[-1][1].set_xlabel("start model's loss, nats per token")


def truth_ratios_of_halves(found: dict[str, list[Half]], file: Path) -> None:
    """Distribution of truth ratios on two halves of the forget rows, beside the retrained model's (figure 2).

    Dotted lines are the largest gaps to it, the KS statistics.

    Args:
        found: Name of a model to its halves; each model must have the same ones; `START` is drawn apart.
        file: Where to draw.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    from simnpo_pl.report.figures import GREY, colour

    names = [half.name for half in next(iter(found.values()))]
    with _panels(file, 1, len(names), (3.3, 2.2), sharex=True, sharey=True) as (_, axes):
        for column, (name, axis) in enumerate(zip(names, axes[0], strict=True)):
            halves = {model: rows[column] for model, rows in found.items()}
            retrained = next(iter(halves.values())).retrained
            axis.step(*distribution(retrained), where="post", color=GREY, linewidth=2, label="retrained")
            methods = [model for model in halves if model != START]
            for model, half in halves.items():
                shade = GREY if model == START else colour(methods.index(model))
                line = "--" if model == START else "-"
                label = f"{model}: {quality_text(half.quality.p_value)}"
                ours = distribution(half.unlearned)
                axis.step(*ours, where="post", color=shade, linestyle=line, linewidth=1.2, label=label)
                gap = largest_gap(half.unlearned, retrained)
                axis.plot([gap.at] * 2, [gap.low, gap.high], color=shade, linewidth=0.8, linestyle=":")
            axis.set_xscale("log")
            # Few labels, which do not run into each other where the ratios span less than a decade.
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{name} half, n = {len(retrained)}")
            axis.legend(title="forget quality", loc="upper left", bbox_to_anchor=(1, 1), fontsize=6, title_fontsize=6)
            axis.set_xlabel("truth ratio R")
        axes[0][0].set_ylabel("share of forget rows")


def heat_maps(
    beta: Sequence[float], gamma: Sequence[float], maps: dict[str, list[list[float]]], title: str, file: Path
) -> None:
    """A map for each metric over beta (across) and gamma (up), every cell with its number (figure A2).

    Args:
        beta: Values of beta.
        gamma: Values of gamma.
        maps: Metric to values, 0 to 1, by gamma and beta.
        title: Of the figure.
        file: Where to draw.
    """
    with _panels(file, 1, len(maps), (0.62 * len(beta) + 1.0, 0.42 * len(gamma) + 0.9)) as (figure, axes):
        for axis, (metric, values) in zip(axes[0], maps.items(), strict=True):
            axis.imshow(values, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
            for row, line in enumerate(values):
                for column, value in enumerate(line):
                    ink = "white" if value > 0.6 else "black"
                    axis.text(column, row, quality_text(value), ha="center", va="center", fontsize=6.5, color=ink)
            axis.set_xticks(range(len(beta)), [f"{value:g}" for value in beta])
            axis.set_yticks(range(len(gamma)), [f"{value:g}" for value in gamma])
            axis.grid(False)
            axis.set_title(metric)
            axis.set_xlabel(r"$\beta$")
        axes[0][0].set_ylabel(r"$\gamma$")
        figure.suptitle(title, fontsize=8)


def quality_text(value: float) -> str:
    """Two digits, or a power of ten where it is small."""
    return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 0.005 else f"{value:.2f}"


def _from_zero(axis: Any, values: Sequence[float]) -> None:
    """Let an axis begin at 0 and leave room above the largest value."""
    axis.set_ylim(0, 1.06 * max(values))
