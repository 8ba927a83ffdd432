"""Evaluate finished runs again after their weights were rounded to 8 or 4 bits, by torchao.

All linear layers of the run's model/ but its output head; 8 bits with one scale an output row, 4 bits with one a
group, both symmetric. What a run's results.json holds already is skipped.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--bits", nargs="+", type=int, choices=(8, 4), default=(8, 4), help="bits of a weight (default: both)"
    )
    parser.add_argument(
        "--group_size", type=int, default=32, help="weights that share a scale at 4 bits (default: %(default)s)"
    )


def run(options: Namespace) -> None:
    """Evaluate every run at every number of bits, add the metrics to its results, print the table.

    Raises:
        UserError: An option is out of range, a folder holds no finished run, or torchao is not installed.
    """
    if options.group_size < 1:
        raise UserError(f"--group_size must be at least 1, got {options.group_size}")

    from lightning.pytorch.utilities import rank_zero_only

    from simnpo_pl.report.robustness import quantized_table
    from simnpo_pl.studies.quantization import Rounding, evaluate_rounded
    from simnpo_pl.studies.reopen import finished_runs

    runs = finished_runs(options.runs)
    for run in runs:
        for bits in options.bits:
            evaluate_rounded(run, Rounding(bits, options.group_size if bits == 4 else None))
    rank_zero_only(print)(quantized_table(runs))
