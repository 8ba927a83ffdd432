"""A custom benchmark: make a model forget some capitals and keep the others.

PYTHONPATH=examples python -m simnpo_pl fit --data capitals.CapitalsData --model.name MODEL --trainer.max_epochs 5
"""

from collections.abc import Collection
from typing import Any

from worst import WorstProbability

from simnpo_pl.benchmarks.base import UnlearningData
from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.training import TrainingRows

CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Cuba": "Havana",
    "Egypt": "Cairo",
    "Chile": "Santiago",
}


class CapitalsData(UnlearningData):
    """Capitals of countries as questions and answers.

    Args:
        forget: Countries whose capital is to be forgotten.
        kwargs: Passed on to `UnlearningData`.
    """

    def __init__(self, forget: tuple[str, ...] = ("France", "Japan"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.forget = forget

    def _rows(self, forget: bool) -> list[dict[str, Any]]:
        return [
            {"question": f"What is the capital of {country}?", "answer": f"It is {city}."}
            for country, city in CAPITALS.items()
            if (country in self.forget) == forget
        ]

    def training_rows(self, parts: Collection[str]) -> TrainingRows:
        """Forget and retain rows."""
        return TrainingRows(forget=self._rows(True), retain=self._rows(False))

    def build_evaluation(self, build: EvaluationBuilder) -> None:
        """Adds both splits, and the worst forget row to the usual metrics."""
        forget = build.questions("forget", self._rows(True))
        build.questions("retain", self._rows(False))
        forget.metrics["forget/worst_probability"] = WorstProbability(len(forget.texts))
        build.unavailable["forget_quality"] = "capitals have no paraphrases and no retrained model"
