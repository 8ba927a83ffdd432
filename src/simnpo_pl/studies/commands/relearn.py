"""Relearning attack (SimNPO paper, section 6): fine-tune the unlearned model on part of what it forgot.

Plain cross-entropy on a share of the forget rows, from the run's model/, all weights trained, at a learning rate that
falls linearly to 0; forget quality and probability before and after every epoch. What a run's results.json holds
already is skipped.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from simnpo_pl.utils.errors import UserError

SUBSETS = ("shortest", "random")


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--subset",
        nargs="+",
        choices=SUBSETS,
        default=SUBSETS,
        help="rows to relearn: those with the shortest answers, in tokens, or a random draw (default: both)",
    )
    parser.add_argument(
        "--share", type=float, default=0.2, help="part of the forget rows, above 0, at most 1 (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="passes over these rows (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-5, help="learning rate at the start (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="random draws (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first draw (default: %(default)s)")


def run(options: Namespace) -> None:
    """Attack every run, add the curves to its results, print the table.

    Raises:
        UserError: An option is out of range, or a folder holds no finished run.
    """
    if not 0 < options.share <= 1:
        raise UserError(f"--share must be above 0 and at most 1, got {options.share}")
    for name in ("epochs", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 < options.lr < float("inf"):
        raise UserError(f"--lr must be a number above 0, got {options.lr}")
    if options.seed < 0:
        raise UserError(f"--seed must be at least 0, got {options.seed}")

    from lightning.pytorch.utilities import rank_zero_only

    from simnpo_pl.report.robustness import relearning_table
    from simnpo_pl.studies.relearning import Attack, relearn
    from simnpo_pl.studies.reopen import finished_runs

    runs = finished_runs(options.runs)
    for run in runs:
        for subset in options.subset:
            seeds = range(options.seed, options.seed + options.repeats) if subset == "random" else [0]
            relearn(run, Attack(subset, options.share, options.epochs, options.lr), seeds)
    rank_zero_only(print)(relearning_table(runs))
