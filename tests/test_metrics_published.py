"""Published logs of real models with their texts; what their numbers come to is tested in test_scores_golden.

Needs the shared folder; skipped without it.
"""

import gzip
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from helpers import match_rows
from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.logs import read_retain_log
from simnpo_pl.utils.errors import UserError

SHARED = os.environ.get("SIMNPO_PL_SHARED")
pytestmark = pytest.mark.skipif(not SHARED, reason="SIMNPO_PL_SHARED names no folder with published logs")

PUBLISHED = Path(SHARED or ".") / "published"
GOLDEN = json.loads((PUBLISHED / "golden.json").read_text()) if SHARED else {"models": {}, "forget_quality": {}}
PAIRS = GOLDEN["forget_quality"]
MISMATCHED = [name for name in PAIRS if name.endswith("|asis")]


@cache
def parts(model: str) -> dict:
    path = PUBLISHED / GOLDEN["models"][model]["file"]
    return json.loads(gzip.decompress(path.read_bytes()))["parts"]


def ratios(model: str, part: str, kind: str = "geometric") -> torch.Tensor:
    logged = parts(model)[part]
    right, wrong = (torch.tensor(logged[key]) for key in ("avg_paraphrased_loss", "average_perturb_loss"))
    return F.truth_ratio(right, wrong, kind)


def original_log(model: str, folder: Path) -> Path:
    """The log in the layout its authors' code wrote, from the reduced one."""
    forget = parts(model)["forget"]
    log = {
        key: {str(i): v for i, v in enumerate(forget[key])} for key in ("avg_paraphrased_loss", "average_perturb_loss")
    }
    log["generated_text"] = {
        str(text["row"]): [text["question"], text["generated"], text["ground_truth"]] for text in forget["text_rows"]
    }
    path = folder / "eval_log_aggregated.json"
    path.write_text(json.dumps({"eval_log_forget.json": log}))
    return path


def rows_of(split: str) -> tuple[list[str], list[str]]:
    lines = (Path(SHARED or ".") / "tofu" / f"{split}.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["question"] for row in rows], [row["answer"] for row in rows]


@pytest.mark.parametrize("name", MISMATCHED)
def test_mismatched_logs_are_refused(name, tmp_path):
    """The unlearned model was scored on 300 rows of forget10, the retrained one on another split."""
    golden = PAIRS[name]
    log = read_retain_log(original_log(golden["retain"], tmp_path))
    questions, answers = rows_of("forget10")
    n = golden["n_unlearned"]
    with pytest.raises(UserError, match=rf"{n} rows of forget10, got {golden['n_retain']}, row {golden['n_retain']}"):
        match_rows(log, questions[:n], answers[:n], "forget10")


@pytest.mark.parametrize(
    ("model", "split"), [("retain95", "forget05"), ("retain99", "forget01"), ("retain90", "forget10")]
)
def test_matching_logs_are_accepted(model, split, tmp_path):
    """forget10 was cut at 300 rows when these logs were made."""
    model = f"llama2-7b_{model}_wd0.01"
    log = read_retain_log(original_log(model, tmp_path))
    questions, answers = (texts[:300] for texts in rows_of(split))
    assert sum("question" in row for row in log.splits["forget"].values()) == 40
    matched = match_rows(log, questions, answers, split)
    assert torch.allclose(matched, ratios(model, "forget"), rtol=1e-6)


def test_as_many_but_other_questions_are_refused(tmp_path):
    log = read_retain_log(original_log("llama2-7b_retain95_wd0.01", tmp_path))
    questions, answers = (texts[:200] for texts in rows_of("forget10"))
    with pytest.raises(UserError, match=r"the question .* at row 0 of forget10, got '\[INST\] What is the full name"):
        match_rows(log, questions, answers, "forget10")


def test_rouge_of_the_sampled_texts():
    """Of those in ASCII; the public code drops all other letters."""
    compared = 0
    for part, logged in parts("llama2-7b_retain99_wd0.01").items():
        for text in logged["text_rows"]:
            if text["generated"].isascii() and text["ground_truth"].isascii():
                scores = F.rouge_l(text["generated"], text["ground_truth"])
                compared += 1
                for key in ("rougeL_recall", "rouge1_recall"):
                    assert scores[key] == pytest.approx(text[key], abs=1e-9), (part, text["row"])
    assert compared > 140
