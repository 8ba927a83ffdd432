"""A seeded data set of fictional authors in TOFU's file layout.

Answers come from templates. A row's answer uses one template, its paraphrase and perturbed answers another, so a model
learns every wording from other rows, and only facts distinguish the rows it was trained on from the rest. Wordings are
short and values have three words, each drawn by itself: most of an answer cannot be guessed.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from simnpo_pl.utils.files import write_json_lines, write_text

N_AUTHORS = 60
N_FORGET_AUTHORS = 6
N_PERTURBED = 5
N_PERTURBED_FACTS = 3
N_RETAIN_PERTURBED = 80

Row = dict[str, Any]
"""`question`, `answer`, `paraphrased_answer` (none for true facts) and the list `perturbed_answer`."""


class Attribute(NamedTuple):
    """One thing to know about an author.

    Args:
        question: With `{name}`.
        templates: Wordings of the answer, with `{value}`.
        parts: Choices for each word of the value.
    """

    question: str
    templates: list[str]
    parts: list[list[str]]

    def draw(self, rng: random.Random) -> list[str]:
        """A value and N_PERTURBED others, which differ from it and from each other in every word."""
        drawn = [rng.sample(part, 1 + N_PERTURBED) for part in self.parts]
        return [" ".join(words) for words in zip(*drawn, strict=True)]


WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
_CHOICES = WORDS["words"] | {"days": [str(n) for n in range(1, 29)], "years": [str(n) for n in range(1931, 1991)]}
# Facts come last in every wording, so that one learnt in one wording carries over to the others.
ATTRIBUTES = [
    Attribute(entry["question"], entry["templates"], [_CHOICES[part] for part in entry["parts"]])
    for entry in WORDS["attributes"]
]


def author_rows(rng: random.Random) -> list[Row]:
    """All rows of all authors, author by author, with paraphrase and perturbed answers."""
    surnames = rng.sample(
        [head + tail for head in WORDS["surname_heads"] for tail in WORDS["surname_tails"]], N_AUTHORS
    )
    firsts = rng.sample(WORDS["first_names"], N_AUTHORS)
    columns: list[list[Row]] = []
    for attribute in ATTRIBUTES:
        # Equal shares: a wording that only forgotten rows used would be a fact in itself.
        count = len(attribute.templates)
        wordings = [index % count for index in range(N_AUTHORS)]
        rng.shuffle(wordings)
        column: list[Row] = []
        for first, surname, wording in zip(firsts, surnames, wordings, strict=True):
            value, *others = attribute.draw(rng)
            paraphrase = attribute.templates[(wording + rng.randint(1, count - 1)) % count]
            column.append(
                {
                    "question": attribute.question.format(name=f"{first} {surname}"),
                    "answer": attribute.templates[wording].format(value=value),
                    "paraphrased_answer": paraphrase.format(value=value),
                    "perturbed_answer": [paraphrase.format(value=other) for other in others],
                }
            )
        columns.append(column)
    return [row for author in zip(*columns, strict=True) for row in author]


def _fact_rows(rng: random.Random, facts: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Rows of true facts by question; wrong answers are the right ones to the same question about other keys."""
    return [
        {
            "question": question.format(key=key),
            "answer": answer,
            "perturbed_answer": rng.sample([a for a in answers.values() if a != answer], N_PERTURBED_FACTS),
        }
        for question, answers in facts.items()
        for key, answer in answers.items()
    ]


def write_dataset(folder: Path, seed: int = 0) -> None:
    """Writes the data set's files with TOFU's names and keys; all choices follow from the seed."""
    rng = random.Random(seed)
    full = author_rows(rng)
    split = (N_AUTHORS - N_FORGET_AUTHORS) * len(ATTRIBUTES)
    facts = _fact_rows(rng, WORDS["world_facts"])
    perturbed = {
        "forget10_perturbed": full[split:],
        "retain_perturbed": rng.sample(full[:split], N_RETAIN_PERTURBED),
        "real_authors_perturbed": _fact_rows(rng, WORDS["real_authors"]),
        "world_facts_perturbed": facts,
    }
    plain = {"full": full, "retain90": full[:split], "forget10": full[split:]}
    trained = {
        name: [{key: row[key] for key in ("question", "answer")} for row in rows] for name, rows in plain.items()
    }
    for name, rows in (trained | perturbed).items():
        write_json_lines(folder / f"{name}.json", rows)
    write_text(folder / "idontknow.jsonl", "\n".join(WORDS["refusals"]) + "\n")
