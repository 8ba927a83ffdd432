"""Scalability (MUSE, criterion 5): the same start model forgets sets of growing size, a run for each.

All options but these are those of `fit`, such as --config configs/muse_news.yaml. Runs that are finished are skipped,
so the same command goes on where it was stopped; written are OUT/1, OUT/2 and so on, table.md, table.json, figure.png.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

TAKES_FIT_OPTIONS = True
SHARES = ("raw/forget[:25%]", "raw/forget[:50%]", "raw/forget[:75%]", "raw/forget")


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where the runs and the table go")
    parser.add_argument(
        "--forget",
        nargs="+",
        default=SHARES,
        metavar="SPLIT",
        help="forget sets of growing size; MUSE-News has scal/forget_1 to scal/forget_4 (default: a quarter, a half, "
        "three quarters and all of the documents of raw/forget)",
    )


def run(options: Namespace) -> None:
    """Run what is not finished yet and print the table.

    Raises:
        UserError: A run fails.
    """
    from simnpo_pl.forget_series import run_series, write_series

    out = options.out.expanduser()
    records = run_series(out, options.forget, options.fit, successive=False)
    print(write_series(out, "Scalability: forget sets of growing size", options.forget, records))
    print(f"written: {out / 'table.md'}, table.json, figure.png")
