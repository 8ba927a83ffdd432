"""Corpus in MUSE's layout about the demo's fictional authors: `python -m simnpo_pl.benchmarks.demo.muse FOLDER`.

The forget and retain authors are those of the demo's data set of the same seed, which the demo's models know; the
holdout authors are others, which no model knows.
"""

import random
import sys
from pathlib import Path

from simnpo_pl.benchmarks.demo.authors import ATTRIBUTES, N_FORGET_AUTHORS, Row, author_rows, question_answer
from simnpo_pl.utils.files import write_json, write_text

SHOTS = 2
"""Examples before a question."""


def write_corpus(folder: Path, seed: int = 0, authors: int = N_FORGET_AUTHORS) -> None:
    """Writes the corpus' files.

    Args:
        folder: Where to write; made when missing.
        seed: Of the demo's data set.
        authors: How many authors each of forget, retain1, retain2 and holdout has, at most as many as the demo forgets.
    """
    known, unknown = (_by_author(author_rows(random.Random(number))) for number in (seed, seed + 1))
    parts = {
        "forget": known[-N_FORGET_AUTHORS:][:authors],
        "retain1": known[:authors],
        "retain2": known[authors : 2 * authors],
        "holdout": unknown[:authors],
    }
    documents = {name: [text for author in part for text in _documents(author)] for name, part in parts.items()}
    for name, texts in documents.items():
        write_json(folder / "raw" / f"{name}.json", texts)
        write_text(folder / "raw" / f"{name}.txt", "\n\n".join(texts))
    passages = [_halves(text.split()) for text in documents["forget"]]
    write_json(folder / "verbmem" / "forget.json", [{"prompt": prompt, "gt": rest} for prompt, rest in passages])
    for name, part in (("forget", "forget"), ("retain", "retain2"), ("holdout", "holdout")):
        write_json(folder / "privleak" / f"{name}.json", documents[part])
        if name != "holdout":
            rows = [question_answer(row) for author in parts[part] for row in author]
            write_json(folder / "knowmem" / f"{name}_qa.json", rows[SHOTS:])
            write_json(folder / "knowmem" / f"{name}_qa_icl.json", rows[:SHOTS])


def _by_author(rows: list[Row]) -> list[list[Row]]:
    return [rows[start : start + len(ATTRIBUTES)] for start in range(0, len(rows), len(ATTRIBUTES))]


def _documents(author: list[Row]) -> list[str]:
    """Two documents, each of half of the author's questions with their answers."""
    return _halves([f"{row['question']} {row['answer']}" for row in author])


def _halves(parts: list[str]) -> list[str]:
    middle = len(parts) // 2
    return [" ".join(parts[:middle]), " ".join(parts[middle:])]


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
