"""Gradient weights over finished runs: against answer length, forget probability and difficulty, by epoch.

After figures 2 and 3 of the SimNPO paper; forget quality on the shortest and the longest half of the forget rows where
the runs were compared with a retrained model.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simnpo_pl.runs.record import Run
    from simnpo_pl.studies.analysis.halves import Half


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs of fit, one a method")
    parser.add_argument(
        "--epochs",
        nargs="+",
        type=int,
        default=[1, 2, 3, 10],
        help="epochs to show, of those that a run has (default: 1 2 3 10)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder of the figures")


def run(options: Namespace) -> None:
    """Print the tables and draw the figures.

    Raises:
        UserError: A folder is no run, its objective has no gradient weights, or matplotlib is not there.
    """
    from simnpo_pl.runs.record import read_runs
    from simnpo_pl.studies.analysis.figures import check_installed

    check_installed()
    for part in describe(read_runs(options.runs), options.epochs, options.out.expanduser(), "weights"):
        print(part)


def describe(runs: "Sequence[Run]", epochs: Sequence[int], folder: Path, prefix: str) -> list[str]:
    """Tables and figures of some runs' gradient weights.

    Args:
        runs: One a method.
        epochs: Of those that a run has.
        folder: Of the figures.
        prefix: First part of their names.

    Returns:
        Paragraphs of Markdown.

    Raises:
        UserError: A run has no gradient weights.
    """
    from simnpo_pl.studies.analysis import figures, tables
    from simnpo_pl.studies.analysis.halves import by_length, qualities

    halves: dict[str, list[Half]] = {}
    for one in runs:
        if one.rows and one.retrained_rows:
            halves[one.name] = qualities(one.rows, one.retrained_rows, by_length(one))
    parts = [tables.weights(runs, epochs)]
    drawn = [folder / f"{prefix}_{name}.png" for name in ("length", "epochs", "knowledge")]
    figures.weight_against_length(runs, epochs, drawn[0])
    figures.weight_by_epoch(runs, drawn[1])
    figures.weight_against_knowledge(runs, epochs, drawn[2])
    measured = [run for run in runs if len(run.record.get("epochs", [])) > 1]
    if measured:
        parts.append(tables.by_epoch(measured, epochs))
        drawn.append(folder / f"{prefix}_quality.png")
        figures.quality_by_epoch(measured, drawn[-1])
    if halves:
        parts.append(tables.halves(halves))
        drawn.append(folder / f"{prefix}_halves.png")
        figures.truth_ratios_of_halves(halves, drawn[-1])
    return [*parts, *(f"figure: {file}" for file in drawn)]
