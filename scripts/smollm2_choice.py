"""How the study of SmolLM2 picks a method's settings among its trials."""

from dataclasses import dataclass
from typing import Any

STEP = {"utility": 0.05, "degeneracy": 0.02}
"""How far both bounds give way at a time."""


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


def is_degenerate(text: str) -> bool:
    """Whether a generated answer is no language: too short, hardly any letters, or repeating itself.

    Fewer than two words; under half of the characters are letters or spaces; or under half of its runs of three words
    are different ones.
    """
    words = text.lower().split()
    if len(words) < 2 or sum(c.isalpha() or c.isspace() for c in text) < len(text) / 2:
        return True
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) < len(runs) / 2


def degeneracy(result: dict[str, Any]) -> float:
    """Share of a run's greedy forget answers that are degenerate."""
    forget = result["rows"]["forget"]
    flags = forget.get("degenerate") or [is_degenerate(text) for text in forget["generation"]]
    return sum(flags) / len(flags)


def metrics_of(result: dict[str, Any]) -> dict[str, Any]:
    """Metrics of the exported model."""
    return result["results"]["final"]["metrics"]


def choose(plan: dict[str, Any], results: dict[str, Any]) -> dict[str, Choice]:
    """The chosen trial of every method by the rule of the study file; methods without a finished trial are left out."""
    rule = plan["rule"]
    start, retrained = (results[f"models/{kind}-{seeds[0]}"] for kind, seeds in plan["models"].items())
    kept = min(metrics_of(model)["model_utility"] for model in (start, retrained))
    chosen = {}
    for method, settings in plan["trials"].items():
        made = []
        for number in range(len(settings)):
            if (trial := results.get(f"trials/{method}-{number}")) is not None:
                metrics = metrics_of(trial)
                # A model that broke down has no numbers.
                utility, quality = (metrics.get(name) or 0.0 for name in ("model_utility", "forget_quality"))
                made.append((quality, -number, utility, degeneracy(trial)))
        for relaxed in range(len(made) and 20):
            least = kept * max(0.0, rule["utility"] - relaxed * STEP["utility"])
            most = degeneracy(retrained) + rule["degeneracy"] + relaxed * STEP["degeneracy"]
            if fit := [trial for trial in made if trial[2] >= least and trial[3] <= most]:
                chosen[method] = Choice(-max(fit)[1], relaxed, least, most)
                break
        else:
            if made:
                best = max(made, key=lambda trial: trial[2])
                chosen[method] = Choice(-best[1], 20, 0.0, 1.0)
    return chosen
