"""Markdown tables: the terminal's, the reports' and the logger's."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without a newline at its end.

    Args:
        heads: Titles of the columns.
        rows: As many cells each; whatever they hold stays in its cell.

    Example:
        >>> print(table(["a", "b"], [["1", "x|y"]]))
        | a | b |
        |---|---|
        | 1 | x\\|y |
    """
    return "\n".join([_row(heads), "|---" * len(heads) + "|", *map(_row, rows)])


def cell(text: str) -> str:
    """A text as it may stand in a cell or in a line of a list."""
    return text.replace("|", "\\|").replace("\n", " ")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"
