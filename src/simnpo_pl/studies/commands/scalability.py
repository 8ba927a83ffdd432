"""Scalability (MUSE, criterion 5): the same start model forgets sets of growing size, a run for each.

All options but these are those of `fit`, such as --config configs/muse_news.yaml. Runs that are finished are skipped,
so the same command goes on where it was stopped; written are OUT/1, OUT/2 and so on, table.md, table.json, figure.png.
"""

from argparse import ArgumentParser, Namespace

from simnpo_pl.studies.commands import _series

TAKES_FIT_OPTIONS = True
SHARES = ("raw/forget[:25%]", "raw/forget[:50%]", "raw/forget[:75%]", "raw/forget")


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    _series.add_arguments(
        parser,
        SHARES,
        "forget sets of growing size; MUSE-News has scal/forget_1 to scal/forget_4 (default: a quarter, a half, "
        "three quarters and all of the documents of raw/forget)",
    )


def run(options: Namespace) -> None:
    """Run what is not finished yet and print the table."""
    _series.run(options, "Scalability: forget sets of growing size", successive=False)
