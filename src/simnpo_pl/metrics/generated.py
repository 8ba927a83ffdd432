"""What the words of a generated answer show: whether it is degenerate, and whether it is the true answer verbatim."""

from collections.abc import Sequence
from itertools import pairwise

import regex

from simnpo_pl.metrics.functional import UNSPACED, words

DEGENERATE, VERBATIM = TEXT_SCORES = ("degenerate", "verbatim")
"""Names of the scores of `text_scores`."""
REPEATED = 0.2
"""Share of repeated pairs of words, above the true answer's."""
LONG, TIMES, LETTERS = 100, 10, 3
"""An answer of more words than LONG, and of TIMES as many as the true one, does not end; LETTERS of scripts without
spaces count as one word."""
# A few letters three times or more, nine letters at least: "henthenthent".
_STUTTER = regex.compile(r"(?=\p{L}{9})(\p{L}{1,8}?)\1{2,}")
# One character over and over, but not decimals (10/3), large round numbers, rows of dots, or lines of a table.
_RUN = regex.compile(r"(?<![.,]\d*)(?:([^0\s\p{P}\p{S}])\1{8,}|0{31,})|([\p{P}\p{S}])\2{100,}")


def text_scores(text: str, truth: str) -> dict[str, float]:
    """`degenerate` and `verbatim`, each 0 or 1, of a generated text whose right answer is `truth`.

    Example:
        >>> text_scores("He wrote Ash and Tide.", "Ash and Tide")
        {'degenerate': 0.0, 'verbatim': 1.0}
        >>> text_scores("Ash and and", "Ash and Tide")
        {'degenerate': 1.0, 'verbatim': 0.0}
    """
    said, right = words(text), words(truth)
    degenerate = is_degenerate(said, right) or bool(_RUN.search(text) and not _RUN.search(truth))
    return {DEGENERATE: float(degenerate), VERBATIM: float(holds(said, right))}


def is_degenerate(said: Sequence[str], right: Sequence[str]) -> bool:
    """Whether the words of an answer are none, repeat each other or do not end, unlike those of the right answer."""
    if not said:
        return bool(right)
    if _length(said) > max(LONG, TIMES * _length(right)) or repetition(said) > repetition(right) + REPEATED:
        return True
    return _stutters(said) and not _stutters(right)


def _length(said: Sequence[str]) -> float:
    return sum(1 / LETTERS if UNSPACED.match(word) else 1 for word in said)


def repetition(said: Sequence[str]) -> float:
    """Share of the pairs of neighboring words that occurred before: 1 less distinct-2 (arXiv 1510.03055), 0 to 1.

    Example:
        >>> repetition(["on", "and", "on", "and", "on"])
        0.5
    """
    pairs = list(pairwise(said))
    return (len(pairs) - len(set(pairs))) / len(pairs) if pairs else 0.0


def holds(said: Sequence[str], right: Sequence[str]) -> bool:
    """Whether the words of the right answer stand in the generated one without another in between."""
    # No word holds a space.
    return bool(right) and f" {' '.join(right)} " in f" {' '.join(said)} "


def _stutters(said: Sequence[str]) -> bool:
    """Whether a word of several letters stands twice in a row, or repeats a few letters over and over."""
    twice = any(one == other and len(one) > 1 and one.isalpha() for one, other in pairwise(said))
    return twice or any(len(found[0]) >= 9 for word in said for found in _STUTTER.finditer(word))
