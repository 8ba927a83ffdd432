"""leak@k of finished runs: sample answers to the forget questions and take the best of k by ROUGE-L recall.

Reported for every k up to --k as the mean over rows of the best answer expected among k of those drawn. What a run's
results.json holds already is skipped.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--k", type=int, default=16, help="answers drawn for each row (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the softmax (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")


def run(options: Namespace) -> None:
    """Sample every run, add leak@k to its results, print the table.

    Raises:
        UserError: An option is out of range, or a folder holds no finished run.
    """
    if options.k < 1:
        raise UserError(f"--k must be at least 1, got {options.k}")
    if not 0 < options.temperature < float("inf"):
        raise UserError(f"--temperature must be a number above 0, got {options.temperature}; greedy answers: predict")
    if options.seed < 0:
        raise UserError(f"--seed must be at least 0, got {options.seed}")

    from lightning.pytorch.utilities import rank_zero_only

    from simnpo_pl.report.robustness import leak_table
    from simnpo_pl.studies.leakage import Sampling, leak
    from simnpo_pl.studies.reopen import finished_runs

    runs = finished_runs(options.runs)
    for run in runs:
        leak(run, Sampling(options.k, options.temperature, options.seed))
    rank_zero_only(print)(leak_table(runs))
