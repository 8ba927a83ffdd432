"""Text and questions in WMDP's form about the demo's authors: `python -m simnpo_pl.benchmarks.demo.wmdp FOLDER`.

The forget authors take the place of the hazardous papers, others that of what is retained. FOLDER/tasks has four-choice
tasks over both for lm-evaluation-harness, named `wmdp_bio` and `mmlu`.
"""

import random
import sys
from pathlib import Path
from typing import Any

import yaml

from simnpo_pl.benchmarks.demo.authors import ATTRIBUTES, N_FORGET_AUTHORS, Row, author_rows
from simnpo_pl.benchmarks.demo.muse import write_corpus
from simnpo_pl.utils.files import read_json, write_json_lines, write_text

LETTERS = ("A", "B", "C", "D")


def write_demo(folder: Path, seed: int = 0) -> None:
    """Writes `forget.jsonl`, `retain.txt` and the tasks.

    Args:
        folder: Where to write; made when missing.
        seed: Of the demo's data set.
    """
    write_corpus(folder / "corpus", seed)
    raw = folder / "corpus" / "raw"
    write_json_lines(folder / "forget.jsonl", [{"text": text} for text in read_json(raw / "forget.json")])
    write_text(folder / "retain.txt", (raw / "retain1.txt").read_text(encoding="utf-8"))
    rows, size = author_rows(random.Random(seed)), N_FORGET_AUTHORS * len(ATTRIBUTES)
    for name, asked in (("wmdp_bio", rows[-size:]), ("mmlu", rows[:size])):
        questions = folder / "tasks" / f"{name}.jsonl"
        write_json_lines(questions, [_four_choices(row, number % len(LETTERS)) for number, row in enumerate(asked)])
        write_text(folder / "tasks" / f"{name}.yaml", yaml.safe_dump(_task(name, questions), sort_keys=False))


def _four_choices(row: Row, right: int) -> dict[str, Any]:
    """A question with its answer at position `right` and three wrong ones."""
    choices = row["perturbed_answer"][: len(LETTERS) - 1]
    choices.insert(right, row["answer"])
    return {"question": row["question"], "choices": choices, "answer": right}


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


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]))
