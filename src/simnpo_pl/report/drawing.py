"""Figures, drawn with matplotlib: SVG inside the report's page, PNG and PDF for print."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import writing

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    # The page's own font; the same run gives the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "simnpo_pl",
}
TIP = "tip:"


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
        with writing(file) as handle:
            figure.savefig(handle, format=file.suffix[1:])


def inline(svg: bytes) -> str:
    """An SVG file as an element of a page, in the page's text color, with the tips of `points` under the pointer."""
    text = svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub('style="[^"]*"', lambda style: style[0].replace("#000000", "currentColor"), text)
    text = re.sub(rf'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", text)
    # Numbered anew in every figure; only what is drawn again is referred to, by other names.
    return re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", text)


def points(axis: Any, places: Sequence[tuple[float, float]], tips: list[str], marker: str = "o", **style: Any) -> None:
    """Markers, each with a text that the page shows under the pointer."""
    for (x, y), tip in zip(places, tips, strict=True):
        axis.plot(x, y, marker, gid=TIP + tip, **style)


def plain(name: str) -> str:
    """A name whose dollar signs do not start a formula, and whose underscore does not hide it from the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def log_labels(axis: Any) -> None:
    """Labels such as 0.2 on a logarithmic x axis; over more than two decades, powers of ten alone."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_xlim()
    if high < 100 * low:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend_outside(axis: Any, title: str) -> None:
    axis.legend(title=title, loc="upper left", bbox_to_anchor=(1, 1), fontsize=6, title_fontsize=6)
