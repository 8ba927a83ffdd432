"""How the study of SmolLM2 picks a method's settings among its trials."""

from dataclasses import dataclass
from statistics import harmonic_mean
from typing import Any

DEGENERATE = "forget/degenerate"


@dataclass(frozen=True)
class Choice:
    """A method's trial.

    Args:
        number: Of the trial, from 0.
        scores: `score` of every finished trial by its number.
    """

    number: int
    scores: dict[int, float]


def metrics_of(result: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the exported model."""
    return result["results"]["final"]["metrics"]


def score(trial: dict[str, Any], retrained: dict[str, Any]) -> float:
    """How near an unlearned model comes to the retrained one, from their metrics: 0 to 1.

    The harmonic mean of three shares, so that none makes up for another: closeness of the forget probabilities, model
    utility as a part of the retrained model's, and forget answers that are not degenerate where the retrained model's
    are not.
    """
    # A model that broke down has no numbers.
    probability, utility = trial["forget/probability"], trial["model_utility"] or 0.0
    if probability is None:
        return 0.0
    return harmonic_mean(
        [
            1 - abs(probability - retrained["forget/probability"]),
            min(1.0, utility / (retrained["model_utility"] or float("inf"))),
            1 - max(0.0, trial[DEGENERATE] - retrained[DEGENERATE]),
        ]
    )


def choose(plan: dict[str, Any], results: dict[str, Any]) -> dict[str, Choice]:
    """The trial with the highest score of every method; methods without a finished trial are left out."""
    retrained = metrics_of(results[f"models/retrained-{plan['models']['retrained'][0]}"])
    chosen = {}
    for method, settings in plan["trials"].items():
        names = [f"trials/{method}-{number}" for number in range(len(settings))]
        scores = {n: score(metrics_of(results[name]), retrained) for n, name in enumerate(names) if name in results}
        if scores:
            chosen[method] = Choice(max(scores, key=scores.__getitem__), scores)
    return chosen
