"""Text and questions in WMDP's form about the demo's authors: `python -m simnpo_pl.benchmarks.demo.wmdp FOLDER`.

The forget authors stand for the hazardous papers, others for what is retained; lm-evaluation-harness finds four-choice
tasks over both in FOLDER/tasks, under the names `wmdp_bio` and `mmlu`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from simnpo_pl.benchmarks.demo.authors import ATTRIBUTES, N_AUTHORS, N_FORGET_AUTHORS, Row, author_rows
from simnpo_pl.benchmarks.demo.muse import write_corpus

LETTERS = ("A", "B", "C", "D")


def write_demo(folder: Path, seed: int = 0) -> None:
    """Write `forget.jsonl`, `retain.txt` and the tasks.

    Args:
        folder: Where to write; made when missing.
        seed: Of the demo's data set.
    """
    write_corpus(folder / "corpus", seed)
    texts = json.loads((folder / "corpus" / "raw" / "forget.json").read_text(encoding="utf-8"))
    _write_lines(folder / "forget.jsonl", ({"text": text} for text in texts))
    retained = (folder / "corpus" / "raw" / "retain1.txt").read_text(encoding="utf-8")
    (folder / "retain.txt").write_text(retained, encoding="utf-8")
    rows = author_rows(random.Random(seed))
    first = (N_AUTHORS - N_FORGET_AUTHORS) * len(ATTRIBUTES)
    kept = N_FORGET_AUTHORS * len(ATTRIBUTES)
    for name, asked in (("wmdp_bio", rows[first:]), ("mmlu", rows[:kept])):
        questions = folder / "tasks" / f"{name}.jsonl"
        questions.parent.mkdir(parents=True, exist_ok=True)
        _write_lines(questions, (_four_choices(row, number % len(LETTERS)) for number, row in enumerate(asked)))
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(_task(name, questions), sort_keys=False))


def _four_choices(row: Row, right: int) -> dict[str, Any]:
    """A question with its answer at a place, and three wrong ones."""
    wrong = list(row["perturbed_answer"])[: len(LETTERS) - 1]
    return {"question": row["question"], "choices": [*wrong[:right], row["answer"], *wrong[right:]], "answer": right}


def _task(name: str, questions: Path) -> dict[str, Any]:
    choices = "".join(f"{letter}. {{{{choices[{number}]}}}}\n" for number, letter in enumerate(LETTERS))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}\n" + choices + "Answer:",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]))
