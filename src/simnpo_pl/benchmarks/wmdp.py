"""WMDP: forget hazardous knowledge of biology or cyber security, keep general language (arXiv 2403.03218).

Training reads plain text, a row a document. The command `lm-eval` measures accuracy on the benchmark's questions and on
MMLU afterwards, on the run's model.
"""

from collections.abc import Collection
from typing import Any

from simnpo_pl.benchmarks.base import UnlearningData
from simnpo_pl.benchmarks.builder import EvaluationBuilder
from simnpo_pl.data.sources import load_split, load_table
from simnpo_pl.data.text import Texts
from simnpo_pl.data.training import Rows, TrainingRows
from simnpo_pl.utils.errors import UserError


class WmdpData(UnlearningData):
    """Documents to forget and to retain, each cut to the longest sequence.

    Args:
        forget: File of documents to forget (JSON lines with `text`), or hub data set or folder where a split is named.
        forget_split: Split of that data set, such as "cyber-forget-corpus"; null takes `forget` for a file.
        retain: The same for what is retained.
        retain_split: Split of that data set; null takes `retain` for a file.
        min_characters: Shorter documents are left out, such as headings and blank lines of wikitext.
        eval_rows: How many documents of each side are measured while training, from the first.
        kwargs: Passed on to `UnlearningData`.
    """

    def __init__(
        self,
        forget: str,
        forget_split: str | None = None,
        retain: str = "Salesforce/wikitext",
        retain_split: str | None = "wikitext-2-raw-v1/test",
        min_characters: int = 51,
        eval_rows: int = 100,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if eval_rows < 1:
            raise UserError(f"--data.eval_rows must be at least 1, got {eval_rows}")
        self.sources = {"forget": (forget, forget_split), "retain": (retain, retain_split)}
        self.min_characters = min_characters
        self.eval_rows = eval_rows
        self._documents: dict[str, list[str]] = {}

    def training_rows(self, parts: Collection[str]) -> TrainingRows:
        """The forget documents and, where the losses ask for them, the retain documents."""
        retain: Rows = Texts(self.documents("retain"), "documents") if "retain" in parts else []
        return TrainingRows(Texts(self.documents("forget"), "documents"), retain)

    def build_evaluation(self, build: EvaluationBuilder) -> None:
        """Adds the loss on the first documents of each side, nats per token."""
        for side in self.sources:
            texts = self.documents(side)[: self.eval_rows]
            build.text(side, Texts(texts, "documents").encode(build.encode, side), texts)
        command = "python -m simnpo_pl lm-eval RUN --tasks wmdp_bio,mmlu"
        build.unavailable["accuracy"] = f"measured on a run's model, by {command}"

    def documents(self, side: str) -> list[str]:
        """Documents of a side that are long enough; read once."""
        if side not in self._documents:
            source, split = self.sources[side]
            option = f"--data.{side}"
            rows = load_table(source, option, ("text",)) if split is None else load_split(source, split, ("text",))
            for index, row in enumerate(rows):
                if not isinstance(row["text"], str):
                    raise UserError(f"{source} row {index}, counted from 0: expected a text, got {row['text']!r}")
            self._documents[side] = [row["text"] for row in rows if len(row["text"]) >= self.min_characters]
            if not self._documents[side]:
                raise UserError(
                    f"{source}: none of {len(rows)} documents has {self.min_characters} characters; lower "
                    "--data.min_characters or give other data"
                )
        return self._documents[side]
