from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a newline at its end."""
    return "\n".join([_row(heads), "|---" * len(heads) + "|", *map(_row, rows)])


def cell(text: str) -> str:
    """Escapes a text for a cell of a table or a line of a list."""
    return text.replace("|", "\\|").replace("\n", " ")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"
