"""The `test` command on three public evaluations of one small model: every row and every metric.

All rows are scored; as in the golden files, answers are generated for the first 100 rows of each split, 64 tokens long.
"""

import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import beyond_ascii
from simnpo_pl.__main__ import main
from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.membership import ATTACKS, privleak

SPLITS = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}
NAMES = ("probability", "rouge", "truth_ratio")
ROWS = {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117, "holdout": 400}


@pytest.fixture(scope="module", params=["retain", "target", "policy"])
def evaluation(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], dict[tuple[str, int], Any]]:
    """Golden metrics, our results and our rows for one of the models."""
    fixture = shared / "goldens" / "A"
    folder = tmp_path_factory.mktemp(request.param) / "run"
    options = ["--config", "configs/tofu.yaml", "--config", "configs/hardware/cpu.yaml", "--run_dir", str(folder)]
    options += ["--model.name", str(fixture / request.param), "--data.path", str(shared / "tofu")]
    options += ["--data.template", "Question: {question}\nAnswer:\n{answer}", "--eval.max_new_tokens", "64"]
    options += ["--eval.generate_rows", "100", "--trainer.enable_progress_bar", "false"]
    options += ["--data.holdout", str(shared / "goldens" / "data" / "holdout10.json")]
    options += ["--eval.mia_reference", str(fixture / "retain"), "--eval.cache_dir", str(folder.parent / "cache")]
    log = "null" if request.param == "retain" else str(fixture / "metrics_retain.json")
    os.environ.pop("SIMNPO_PL_RUN_DIR", None)
    main(["test", *options, "--eval.retain_log", log, "--debug"])
    golden = json.loads((fixture / f"metrics_{request.param}.json").read_text())
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    by_index = {(row["split"], row["index"]): row for row in rows}
    return golden, json.loads((folder / "results.json").read_text()), by_index


def test_every_row_is_there_once(evaluation):
    _, results, rows = evaluation
    assert len(rows) == sum(ROWS.values())
    assert {s: sum(split == s for split, _ in rows) for s in ROWS} == ROWS
    assert results["counts"]["forget/probability"] == 400
    assert results["counts"]["forget/rouge"] == 100


@pytest.mark.parametrize("split", SPLITS)
def test_losses_by_row(evaluation, split: str):
    golden, _, rows = evaluation
    golden = golden["metrics"]
    prefix = SPLITS[split]
    for i in range(ROWS[split]):
        row = rows[split, i]
        assert row["answer_nll"] == pytest.approx(
            golden[f"{prefix}_Q_A_Prob"]["value_by_index"][str(i)]["avg_loss"], abs=2e-5
        )
        wrong = golden[f"{prefix}_Q_A_PERT_Prob"]["value_by_index"][str(i)]["avg_loss"]
        assert row["perturbed_nll"] == pytest.approx(wrong, abs=2e-5)
        right = golden[f"{prefix}_Q_A_{'PARA_' if prefix in ('forget', 'retain') else ''}Prob"]["value_by_index"][
            str(i)
        ]
        # From the losses: the stored ratios add 1e-10 to a probability that may be as small.
        ratio = math.exp(right["avg_loss"] - sum(wrong) / len(wrong))
        assert row["truth_ratio"] == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_generations_and_rouge_by_row(evaluation, split: str):
    """Texts are equal to the character for the 100 rows that were generated, and so are the scores of ASCII ones."""
    golden, _, rows = evaluation
    entries = golden["metrics"][f"{SPLITS[split]}_Q_A_ROUGE"]["value_by_index"]
    gains = beyond_ascii([rows[split, int(i)] for i in entries], "rougeL_recall", stem=True)
    for (i, entry), gain in zip(entries.items(), gains, strict=True):
        row = rows[split, int(i)]
        assert row["generation"] == entry["generation"]
        assert row["rougeL_recall"] - gain == pytest.approx(entry["rougeL_recall"], abs=1e-6)


def test_memorization_by_row(evaluation):
    """Public code gives 1/n instead of 0 for extraction strength where not even the last token is right."""
    golden, _, rows = evaluation
    golden = golden["metrics"]
    differing = 0
    for i in range(400):
        row = rows["forget", i]
        exact = golden["exact_memorization"]["value_by_index"][str(i)]["score"]
        strength = golden["extraction_strength"]["value_by_index"][str(i)]["score"]
        differing += row["exact_memorization"] != pytest.approx(exact, abs=1e-5)
        if row["extraction_strength"] == 0:
            assert strength < 0.26
            assert 1 / strength == pytest.approx(round(1 / strength), abs=1e-4)
        else:
            assert row["extraction_strength"] == pytest.approx(strength, abs=1e-5)
    # A token whose two best logits agree to the last bit may fall either way.
    assert differing <= 1


def test_aggregates(evaluation):
    golden, results, rows = evaluation
    ours = dict(results["final"]["metrics"])
    parts = {f"{split}/{name}" for split in SPLITS if split != "forget" for name in NAMES}
    assert ours["model_utility"] == pytest.approx(F.model_utility({name: ours[name] for name in parts}))
    for split in SPLITS:
        generated = [row for (name, _), row in rows.items() if name == split and "generation" in row]
        ours[f"{split}/rouge"] -= statistics.mean(beyond_ascii(generated, "rougeL_recall", stem=True))
    ours["model_utility"] = F.model_utility({name: ours[name] for name in parts})
    agg = golden["agg"]
    expected = {"model_utility": agg["model_utility"], "forget/truth_ratio": agg["forget_truth_ratio"]}
    expected["forget/exact_memorization"] = agg["exact_memorization"]
    for split, prefix in SPLITS.items():
        own = prefix in ("forget", "retain")
        expected[f"{split}/probability"] = agg[f"{prefix}_Q_A_Prob" if own else f"{prefix}_Q_A_Prob_normalised"]
        expected[f"{split}/rouge"] = agg[f"{prefix}_Q_A_ROUGE"]
        if prefix != "forget":
            expected[f"{split}/truth_ratio"] = agg[f"{prefix}_Truth_Ratio"]
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-4), name


def test_forget_quality(evaluation):
    golden, results, _ = evaluation
    expected = golden["agg"]["forget_quality"]
    if expected is None:
        assert "give --eval.retain_log FILE" in results["unavailable"]["forget_quality"]
        assert "forget_quality" not in results["final"]["metrics"]
    else:
        assert results["final"]["metrics"]["forget_quality"] == pytest.approx(expected, rel=1e-4)
        assert results["counts"]["forget_quality"] == 400


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "mia_gradnorm"])
def test_membership_by_row(evaluation, name: str):
    golden, results, rows = evaluation
    stored = golden["metrics"][name]
    for split in ("forget", "holdout"):
        found = [rows[split, i][name] for i in range(400)]
        assert found == pytest.approx(stored[split]["value_by_index"], abs=2e-5)
    assert results["final"]["metrics"][name] == pytest.approx(stored["auc"], abs=1e-4)
    assert (results["counts"][name], results["final"]["metrics"][f"{name}/m"]) == (400, 400)


def test_privleak(evaluation):
    """The public code takes 0.5 for a model without a retrained one; we say that it was not measured."""
    golden, results, _ = evaluation
    found = results["final"]["metrics"]
    if golden["agg"]["forget_quality"] is None:
        assert "give --eval.retain_log FILE" in results["unavailable"]["privleak"]
        assert privleak(found["mia_min_k"], 0.5) == pytest.approx(golden["agg"]["privleak"], abs=0.02)
    else:
        assert found["privleak"] == pytest.approx(golden["agg"]["privleak"], abs=1e-4)


@pytest.mark.parametrize(("convention", "name"), [("prob_mean", "prob_mean"), ("arithmetic", "locuslab_utils_arith")])
def test_model_utility_by_other_truth_ratios(evaluation, convention: str, name: str):
    golden, results, rows = evaluation
    parts = {}
    for split in ("retain", "real_authors", "world_facts"):
        own = [rows[split, i] for i in range(ROWS[split])]
        right = torch.tensor([row["paraphrase_nll" if split == "retain" else "answer_nll"] for row in own])
        ratio = F.truth_ratio(right, torch.tensor([row["perturbed_nll"] for row in own]), convention)
        parts[split] = ratio.mean().item() if convention == "prob_mean" else F.utility_truth_ratio(ratio)
        parts[f"{split} probability"] = results["final"]["metrics"][f"{split}/probability"]
        parts[f"{split} rouge"] = golden["agg"][f"{SPLITS[split]}_Q_A_ROUGE"]
    assert F.model_utility(parts) == pytest.approx(golden["model_utility_variants"][name], abs=1e-5)
