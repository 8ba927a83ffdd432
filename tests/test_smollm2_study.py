"""The study of SmolLM2: its tasks and its rule, and the whole of it with a tiny model."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ks_2samp

from simnpo_pl.metrics.functional import model_utility

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "smollm2_study.py"
STUDY = ROOT / "configs" / "study" / "smollm2" / "study.yaml"
sys.path.append(str(SCRIPT.parent))

from smollm2_choice import choose  # noqa: E402
from smollm2_compare import HOLDS, MEASURES, OPPOSITE, UNKNOWN, Measure, Model, columns, compare, weighted  # noqa: E402
from smollm2_report import fill  # noqa: E402
from smollm2_study import Study, is_tuned, pending  # noqa: E402

TINY = {
    "fit": str(STUDY.with_name("fit.yaml")),
    "data": {"start": "forget10+retain90[:10]", "retrained": "retain90[:10]"},
    "models": {"start": [0, 1], "retrained": [0, 1]},
    "finetune": "--model.objective FineTune --model.retain_loss null --model.lr 1e-2 --trainer.max_epochs 1 "
    "--eval.final false",
    "trials": {"SimNPO": ["--model.lr 1e-2", "--model.lr 1e-3"], "NPO": ["--model.lr 1e-2", "--model.lr 1e-3"]},
    "seeds": [1, 2],
    "attacks": {
        "relearn": {"options": "--subset random --repeats 1 --epochs 1", "seeds": [1, 2]},
        "quantize": {"options": "--bits 4", "seeds": [1, 2]},
        "leak": {"options": "--k 2", "seeds": [2]},
    },
}
OPTIONS = (
    *("--data.forget_split", "forget10", "--data.retain_split", "retain90[:10]", "--data.holdout", "retain90[10:20]"),
    *("--data.retain_eval_split", "retain_perturbed", "--data.effective_batch", "8", "--data.per_device_batch", "8"),
    *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--eval.max_new_tokens", "3"),
    *("--trainer.accelerator", "cpu"),
)


def result(probability: float | None, utility: float | None, degenerate: float = 0) -> dict[str, Any]:
    metrics = {"forget/probability": probability, "model_utility": utility, "forget/degenerate": degenerate}
    return {"results": {"final": {"metrics": metrics}}}


@pytest.fixture
def models() -> dict[str, Any]:
    return {"models/start-0": result(1, 0.6), "models/retrained-0": result(0.1, 0.5, 0.2)}


def test_rule_takes_the_trial_nearest_to_the_retrained_model(models: dict[str, Any]):
    """One share of 0.5 beside two of 1 gives 3 / (1 + 1 + 2); no trial is rewarded beyond the retrained model."""
    trials = {
        **{"trials/SimNPO-0": result(0.6, 0.5, 0.2), "trials/SimNPO-1": result(0.1, 0.25, 0.1)},
        **{"trials/NPO-0": result(0.1, 0.5, 0.7), "trials/NPO-1": result(0.0, 0.9)},
    }
    chosen = choose(TINY, models | trials)
    assert chosen["SimNPO"].scores == {0: pytest.approx(0.75), 1: pytest.approx(0.75)}
    assert chosen["NPO"].number == 1
    assert chosen["NPO"].scores == {0: pytest.approx(0.75), 1: pytest.approx(3 / (1 / 0.9 + 2))}


def test_rule_takes_a_model_that_broke_down_last(models: dict[str, Any]):
    broken = {"trials/NPO-0": result(None, None, 1), "trials/NPO-1": result(0.1, 0.01)}
    chosen = choose(TINY, models | broken)
    assert (chosen["NPO"].number, chosen["NPO"].scores[0]) == (1, 0)
    assert "SimNPO" not in chosen


def test_order_of_tasks(models: dict[str, Any], tmp_path: Path):
    """The reference is measured before all that is compared with it; chosen runs wait for all trials."""
    study = Study(TINY, tmp_path, "base", [])
    parts = ("models", "trials", "runs", "relearn")

    def names(results: dict[str, Any], failed: set[str]) -> list[str]:
        return [task.name for task in pending(study, results, failed, parts, [])]

    first = names({}, set())
    assert first == ["train/retrained-0", "train/start-0", "train/start-1", "train/retrained-1"]
    tasks = {task.name: task for task in study.tasks({}, tuned=False)}

    def done(name: str, **content: Any) -> dict[str, Any]:
        return {name: {"words": list(tasks[name].words), **content}}

    made = {name: value for task in first for name, value in done(task).items()}
    assert names(made, set()) == ["models/retrained-0"]
    for name, content in models.items():
        made |= done(name, **content)
    waiting = names(made, set())
    assert waiting == [
        *("models/start-1", "models/retrained-1", "trials/SimNPO-0", "trials/NPO-0", "trials/SimNPO-1", "trials/NPO-1"),
        "relearn/retrained-0",
    ]
    for name in waiting[2:5]:
        made |= done(name, **result(0.5, 0.5))
    assert not is_tuned(study, made, set())
    assert is_tuned(study, made, {"trials/NPO-1"})
    runs = [name for name in names(made, {"trials/NPO-1"}) if name.startswith("runs/")]
    assert len(runs) == 2 * 2 * 2
    assert runs[:2] == ["runs/SimNPO-start0-seed1", "runs/NPO-start0-seed1"]
    leaked = [task for task in study.tasks(made, tuned=True) if task.part == "leak"]
    assert {task.name.rsplit("-", 1)[1] for task in leaked} == {"seed2", "0", "1"}


def test_other_settings_are_refused(tmp_path: Path):
    study = Study(TINY, tmp_path, "base", [])
    with pytest.raises(SystemExit, match=r"train/start-0 in .* was made with other settings"):
        list(pending(study, {"train/start-0": {"words": ["fit", "--model.lr", "1"]}}, set(), ("models",), []))


def test_trials_are_equally_many_and_shared_by_no_method():
    plan = yaml.safe_load(STUDY.read_text())
    assert len({len(settings) for settings in plan["trials"].values()}) == 1
    assert all(len(set(settings)) == len(settings) >= 6 for settings in plan["trials"].values())


def measured(seed: int, rows: int = 40) -> dict[str, Any]:
    """A run with random scores."""
    random = np.random.default_rng(seed)
    scores = ("probability", "rougeL_recall", "truth_ratio", "answer_nll")
    splits = ("forget", "retain", "real_authors", "world_facts")
    content = {split: {score: random.random(rows).tolist() for score in scores} for split in splits}
    content["forget"] |= {"answer": ["x" * (1 + row) for row in range(rows)], "generation": ["an answer"] * rows}
    return {"results": {"final": {"metrics": {"forget/probability": 0.5}}}, "rows": content}


def model(seed: int, **attacks: Any) -> Model:
    return Model(measured(seed), measured(0), **attacks)


def test_statistics_under_equal_weights():
    """The resampled statistics are those of scipy and of the package."""
    one = {split: np.ones((1, 40)) for split in ("forget", "retain", "real_authors", "world_facts")}
    found, reference = model(1), columns(measured(0), "forget")
    assert found.ks(one) == pytest.approx(ks_2samp(found.forget["truth_ratio"], reference["truth_ratio"]).statistic)
    halves = [
        ks_2samp(found.forget["truth_ratio"][h], reference["truth_ratio"][h]).statistic
        for h in np.split(np.arange(40), 2)
    ]
    assert found.length_gap(one) == pytest.approx(halves[0] - halves[1])
    parts = {}
    for split in ("retain", "real_authors", "world_facts"):
        scores = columns(found.result, split)
        parts |= {
            f"{split}{i}": float(np.mean(v))
            for i, v in enumerate((scores["probability"], scores["rougeL_recall"], 1 - scores["truth_ratio"]))
        }
    assert found.utility(one) == pytest.approx(model_utility(parts))


def test_weights_are_counts_of_rows():
    twice = {"forget": np.concatenate([np.full((1, 20), 2.0), np.zeros((1, 20))], axis=1)}
    ours, theirs = (columns(measured(seed), "forget")["truth_ratio"][:20] for seed in (1, 0))
    assert model(1).ks(twice) == pytest.approx(ks_2samp(ours, theirs).statistic)


def test_interval_over_pairs():
    """Differences of 1 and 3: their resampled means are 1, 2 and 3 with shares of a quarter, a half, a quarter."""
    values = {"a": 2.0, "b": 5.0}
    ours = {pair: model(1, rounded={"forget/probability": value}) for pair, value in values.items()}
    others = {pair: model(2, rounded={"forget/probability": value}) for pair, value in {"a": 1.0, "b": 2.0}.items()}
    found = compare(MEASURES["rounded"], ours, others | {"c": model(2)})
    assert found is not None
    assert (found.mean, found.low, found.high, found.pairs) == (2, 1, 3, 2)
    assert (found.verdict(1), found.verdict(-1)) == (HOLDS, OPPOSITE)
    assert compare(MEASURES["leak"], ours, others) is None
    same = compare(MEASURES["utility"], ours, ours)
    assert same is not None
    assert (same.mean, same.low, same.high, same.verdict(1)) == (0, 0, 0, UNKNOWN)


def test_rows_are_resampled_alike_for_both_models():
    """A model that is better by 0.1 on every row is better by exactly that in every draw."""
    better = model(1)
    better.forget["probability"] += 0.1
    measure = Measure("", 1, lambda one, weights: weighted(one.forget["probability"], weights["forget"]))
    found = compare(measure, {"a": better, "b": better}, {"a": model(1), "b": model(1)})
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_page_is_filled_between_its_marks():
    page = "a\n<!-- smollm2 x -->\nold\n<!-- /smollm2 x -->\nb\n"
    assert fill(page, {"x": r"new \1", "y": ""}) == "a\n<!-- smollm2 x -->\nnew \\1\n<!-- /smollm2 x -->\nb\n"


@pytest.mark.slow
def test_whole_study(tmp_path: Path, data_folder: Path, model_folder: Path):
    """Every task runs, a second call makes nothing, and a page is written."""
    file = tmp_path / "study.yaml"
    few = {name: settings[:1] for name, settings in TINY["trials"].items()}
    file.write_text(yaml.safe_dump({**TINY, "trials": few, "models": {"start": [0], "retrained": [0, 1]}}))
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(out), "--study", str(file)]
    call = [*command, "--base", str(model_folder), "--data", str(data_folder), *OPTIONS]
    for times in range(2):
        done = subprocess.run([*call, "--jobs", "2"], cwd=ROOT, capture_output=True, text=True, check=True)
        # 3 trained and 3 measured models, 2 trials, 4 runs; 2 attacks on 4 and 1 on 2 runs, each on 2 retrained models.
        assert "28 tasks finished, 0 failed, 0 known ones left" in done.stdout, done.stdout
        assert (len(done.stdout.splitlines()) == 1) == bool(times)
    content = json.loads(gzip.decompress((out / "results.json.gz").read_bytes()))
    assert len(content["models/start-0"]["rows"]["forget"]["generation"]) == 10
    assert not (out / "trials" / "NPO-0" / "model").exists()
    page = tmp_path / "page.md"
    names = ("runs", "trials", "models", "utility", "attacks", "pairs", "claims")
    page.write_text("".join(f"<!-- smollm2 {name} -->\nEMPTY\n<!-- /smollm2 {name} -->\n" for name in names))
    subprocess.run([*command, "--report", "--write", str(page)], cwd=ROOT, capture_output=True, check=True)
    text = page.read_text()
    assert "EMPTY" not in text
    assert text.count("| chosen |") == 2
    assert "retrained, other seeds" in text
    assert "2 pairs" in text
    assert (tmp_path / "figures" / "smollm2.png").stat().st_size > 1000
