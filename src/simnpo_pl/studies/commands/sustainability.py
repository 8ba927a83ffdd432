"""Sustainability (MUSE, criterion 6): requests to forget that come one after the other, each on the model before it.

All options but these are those of `fit`, such as --config configs/muse_news.yaml. Runs that are finished are skipped,
so the same command goes on where it was stopped; written are OUT/1, OUT/2 and so on, table.md, table.json, figure.png.
"""

from argparse import ArgumentParser, Namespace

from simnpo_pl.studies.commands import _series

TAKES_FIT_OPTIONS = True
PARTS = ("raw/forget[:25%]", "raw/forget[25%:50%]", "raw/forget[50%:75%]", "raw/forget[75%:]")


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    _series.add_arguments(
        parser,
        PARTS,
        "what each request asks to forget; MUSE-News has sust/forget_1 to sust/forget_4 (default: the four "
        "quarters of the documents of raw/forget)",
    )


def run(options: Namespace) -> None:
    """Run what is not finished yet and print the table."""
    _series.run(options, "Sustainability: successive requests to forget", successive=True)
