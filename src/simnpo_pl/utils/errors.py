from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input that the user can fix: expected, found and what to do, in one line that the command line prints."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; the nearest is X`, for messages about a mistyped name; nothing if no known name is like it."""
    return "".join(f"; the nearest is {found}" for found in get_close_matches(name, list(known), 1))
