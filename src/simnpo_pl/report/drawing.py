"""Figures as PNG files for print, drawn with matplotlib; plotly's own export would need a browser."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from simnpo_pl.utils.errors import UserError

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
LINES = {"solid": "-", "dot": ":", "dash": "--"}
MARKERS = {"circle-open": "s", "star": "*"}


def check_installed() -> None:
    """Raise a UserError if figures cannot be drawn; called before hours of runs."""
    if find_spec("matplotlib") is None:
        raise UserError("figures need matplotlib: pip install 'simnpo_pl[report]'")


@contextmanager
def panels(file: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[tuple[Any, Any]]:
    """Figure and its axes `(rows, columns)`, each of this size in inches; the file is written at the end."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=200, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)


def draw(axis: Any, data: list[dict[str, Any]], layout: dict[str, Any]) -> None:
    """Draw plotly's scatter traces, as far as `figures` uses them."""
    for trace in data:
        x, y, line, marker = trace["x"], trace["y"], trace["line"], trace.get("marker", {})
        style = {"color": line["color"], "label": trace["name"]}
        if trace["mode"] == "markers":
            axis.plot(x, y, MARKERS[marker["symbol"]], markersize=8, zorder=3, **style)
            continue
        style |= {"linestyle": LINES[line["dash"]], "linewidth": 0.7 * line["width"]}
        steps = "steps-post" if line["shape"] == "hv" else "default"
        axis.errorbar(x, y, trace.get("error_y", {}).get("array"), drawstyle=steps, capsize=2, **style)
        if "markers" in trace["mode"]:
            axis.scatter(x, y, (0.6 * np.array(marker.get("size", 6))) ** 2, color=line["color"])
    for shape in layout.get("shapes", []):
        axis.axhline(shape["y0"], color=shape["line"]["color"], linewidth=0.8, linestyle="--")
    axis.set_xscale(layout["xaxis"].get("type", "linear"))
    axis.set_xlabel(layout["xaxis"]["title"]["text"])
    axis.set_ylabel(layout["yaxis"]["title"]["text"])
    axis.legend(fontsize=7)


def legend_outside(axis: Any, title: str) -> None:
    axis.legend(title=title, loc="upper left", bbox_to_anchor=(1, 1), fontsize=6, title_fontsize=6)
