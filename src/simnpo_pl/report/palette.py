"""Colours of runs, readable on white and on black; a run has the same one in every figure."""

PALETTE = ("#3b82c4", "#d9822b", "#3a9d5d", "#b5539c", "#c0504d", "#7a6cc7", "#4f9292", "#a88b2c")
GREY = "#8a8a8a"
"""Of models that runs are compared with."""


def colour(number: int) -> str:
    """Colour of the run with this number."""
    return PALETTE[number % len(PALETTE)]
