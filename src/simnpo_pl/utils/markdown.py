from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = [f"| {' | '.join(map(cell, cells))} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def cell(text: str) -> str:
    """Escapes a text for a cell of a table or a line of a list."""
    return text.replace("|", "\\|").replace("\n", " ")
