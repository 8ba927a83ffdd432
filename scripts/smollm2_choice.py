"""How the study of SmolLM2 picks a method's settings among its trials."""

from dataclasses import dataclass
from typing import Any

STEP = {"utility": 0.05, "degeneracy": 0.02}
"""How far both bounds give way at a time."""
DEGENERATE = "forget/degenerate"
RELAXED = 20
"""Times; the trial with the highest utility is taken then."""


@dataclass(frozen=True)
class Choice:
    """A method's trial.

    Args:
        number: Of the trial, from 0.
        relaxed: How often the bounds were relaxed until a trial met them.
        utility: Model utility that the trial had to reach.
        degeneracy: Share of degenerate answers that it was allowed.
    """

    number: int
    relaxed: int
    utility: float
    degeneracy: float


def metrics_of(result: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the exported model."""
    return result["results"]["final"]["metrics"]


def choose(plan: dict[str, Any], results: dict[str, Any]) -> dict[str, Choice]:
    """The chosen trial of every method by the rule of the study file; methods without a finished trial are left out."""
    start, retrained = (results[f"models/{kind}-{seeds[0]}"] for kind, seeds in plan["models"].items())
    kept = min(metrics_of(model)["model_utility"] for model in (start, retrained))
    chosen = {}
    for method, settings in plan["trials"].items():
        names = [f"trials/{method}-{number}" for number in range(len(settings))]
        made = {number: results[name] for number, name in enumerate(names) if name in results}
        if made:
            chosen[method] = _best(made, plan["rule"], kept, metrics_of(retrained)[DEGENERATE])
    return chosen


def _best(trials: dict[int, dict[str, Any]], rule: dict[str, float], kept: float, degenerate: float) -> Choice:
    """By the rule, from utility and share of degenerate answers of the models it compares with."""

    def metric(number: int, name: str) -> float:
        # A model that broke down has no numbers.
        return metrics_of(trials[number])[name] or 0.0

    for relaxed in range(RELAXED):
        least = kept * max(0.0, rule["utility"] - relaxed * STEP["utility"])
        most = degenerate + rule["degeneracy"] + relaxed * STEP["degeneracy"]
        fit = [n for n in trials if metric(n, "model_utility") >= least and metric(n, DEGENERATE) <= most]
        if fit:
            return Choice(max(fit, key=lambda n: metric(n, "forget_quality")), relaxed, least, most)
    return Choice(max(trials, key=lambda n: metric(n, "model_utility")), RELAXED, 0.0, 1.0)
