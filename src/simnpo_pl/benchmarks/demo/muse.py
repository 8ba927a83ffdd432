"""Corpus in MUSE's layout about the demo's fictional authors: `python -m simnpo_pl.benchmarks.demo.muse FOLDER`.

The forget and retain authors are those of the demo's data set of the same seed, which the demo's models know; the
holdout authors are others, which no model knows.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from simnpo_pl.benchmarks.demo.authors import ATTRIBUTES, N_AUTHORS, N_FORGET_AUTHORS, Row, author_rows

SHOTS = 2
"""Examples before a question."""


def write_corpus(folder: Path, seed: int = 0, authors: int = N_FORGET_AUTHORS) -> None:
    """Write the corpus' files.

    Args:
        folder: Where to write; made when missing.
        seed: Of the demo's data set.
        authors: How many authors each of forget, retain1, retain2 and holdout has, at most as many as the demo forgets.
    """
    known, unknown = (_by_author(random.Random(number)) for number in (seed, seed + 1))
    parts = {
        "forget": known[N_AUTHORS - N_FORGET_AUTHORS :][:authors],
        "retain1": known[:authors],
        "retain2": known[authors : 2 * authors],
        "holdout": unknown[:authors],
    }
    documents = {name: [text for author in part for text in _documents(author)] for name, part in parts.items()}
    for name, texts in documents.items():
        _write(folder / "raw" / f"{name}.json", texts)
        (folder / "raw" / f"{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    _write(folder / "verbmem" / "forget.json", [_halves(text) for text in documents["forget"]])
    for name, part in (("forget", "forget"), ("retain", "retain2")):
        rows = [{key: row[key] for key in ("question", "answer")} for author in parts[part] for row in author]
        _write(folder / "knowmem" / f"{name}_qa.json", rows[SHOTS:])
        _write(folder / "knowmem" / f"{name}_qa_icl.json", rows[:SHOTS])
    for name, part in (("forget", "forget"), ("retain", "retain2"), ("holdout", "holdout")):
        _write(folder / "privleak" / f"{name}.json", documents[part])


def _by_author(rng: random.Random) -> list[list[Row]]:
    rows = author_rows(rng)
    return [rows[start : start + len(ATTRIBUTES)] for start in range(0, len(rows), len(ATTRIBUTES))]


def _documents(author: list[Row]) -> list[str]:
    """Two documents an author, of half its questions with their answers each."""
    lines = [f"{row['question']} {row['answer']}" for row in author]
    middle = len(lines) // 2
    return [" ".join(lines[:middle]), " ".join(lines[middle:])]


def _halves(text: str) -> dict[str, str]:
    words = text.split()
    middle = len(words) // 2
    return {"prompt": " ".join(words[:middle]), "gt": " ".join(words[middle:])}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
