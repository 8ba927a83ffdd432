"""Checks of hyper-parameters; each gives the value back or raises `UserError`."""

import math

from simnpo_pl.utils.errors import UserError


def positive(name: str, value: float) -> float:
    """A hyper-parameter that must be above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"--model.objective.{name} must be a number above 0, got {value}: the usual range is 0.05 to 10"
        )
    return value


def not_negative(name: str, value: float) -> float:
    """A hyper-parameter that must be at least 0."""
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"--model.objective.{name} must be a number of at least 0, got {value}")
    return value


def one_of(option: str, value: str, known: tuple[str, ...]) -> str:
    """A setting that must be one of a few words."""
    if value not in known:
        raise UserError(f"--model.{option} must be {' or '.join(known)}, got {value!r}")
    return value
