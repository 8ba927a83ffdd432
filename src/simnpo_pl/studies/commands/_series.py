"""What `scalability` and `sustainability` have in common: a run of `fit` for every forget set."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path


def add_arguments(parser: ArgumentParser, default: Sequence[str], what: str) -> None:
    """Options of the command.

    Args:
        parser: The command's.
        default: Forget sets where none are named.
        what: What a forget set is here.
    """
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the runs and the table go")
    parser.add_argument("--forget", nargs="+", default=default, metavar="SPLIT", help=what)


def run(options: Namespace, title: str, successive: bool) -> None:
    """Run what is not finished yet and print the table.

    Args:
        options: Of the command.
        title: Of the table.
        successive: Whether each run starts from the model of the one before.

    Raises:
        UserError: A run fails.
    """
    from simnpo_pl.studies.series import run_series, write_series

    out = options.out.expanduser()
    records = run_series(out, options.forget, options.fit, successive)
    print(write_series(out, title, options.forget, records))
    print(f"written: {out / 'table.md'}, table.json, figure.png")
