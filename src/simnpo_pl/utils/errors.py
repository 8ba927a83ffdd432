from collections.abc import Iterable
from difflib import get_close_matches
from math import inf


class UserError(ValueError):
    """Bad input that the user can fix: expected, found and what to do, in one line that the command line prints."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; the nearest is X`, for messages about a mistyped name; nothing if no known name is like it."""
    return "".join(f"; the nearest is {found}" for found in get_close_matches(name, list(known), 1))


def positive(option: str, value: float) -> float:
    """The value of a setting, which must be above 0."""
    if not 0 < value < inf:
        raise UserError(f"{option} must be a number above 0, got {value}")
    return value


def not_negative(option: str, value: float) -> float:
    """The value of a setting, which must be at least 0."""
    if not 0 <= value < inf:
        raise UserError(f"{option} must be a number of at least 0, got {value}")
    return value


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """The value of a setting, which must be one of a few words."""
    if value not in known:
        raise UserError(f"{option} must be {' or '.join(known)}, got {value!r}")
    return value
