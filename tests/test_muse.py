"""MUSE: values of muse_bench's own functions on a small corpus, and whole runs on a generated one."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers import beyond_ascii
from simnpo_pl.__main__ import main
from simnpo_pl.benchmarks.muse import MuseData, cut_answer
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.utils.errors import UserError

ROOT = Path(__file__).parents[1]
METRICS = {"verbmem_forget": "verbmem_f", "knowmem_forget": "knowmem_f", "knowmem_retain": "knowmem_r"}
NEAR_TIE = 1e-3
"""Gap of the two largest logits below which another machine may generate something else."""


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def rows(folder: Path, split: str, file: str = "rows.jsonl") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / file).read_text().splitlines())
    return [row for row in lines if row["split"] == split]


@pytest.fixture(scope="module")
def golden_run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluation of the golden corpus' target model, compared with its retrained model."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    fixture = shared / "goldens" / "A"
    main(
        [
            *("test", "--config", str(ROOT / "configs" / "muse_news.yaml"), "--run_dir", str(folder)),
            *("--model.name", str(fixture / "target"), "--data.tokenizer", "null"),
            *("--data.path", str(shared / "goldens" / "muse" / "corpus"), "--eval.retrained", str(fixture / "retain")),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--eval.cache_dir", "null"),
            "--debug",
        ]
    )
    return folder


@pytest.mark.parametrize("role", ["final", "retrained"])
@pytest.mark.parametrize("name", METRICS)
def test_golden_memorization(golden_run: Path, shared: Path, role: str, name: str):
    """Means as eval_model gives them, apart from letters that its tokenizer drops."""
    which = {"final": "target", "retrained": "retain"}[role]
    golden = json.loads((shared / f"goldens/muse/A/muse_{which}.json").read_text())
    own = rows(golden_run, name, "retrained_rows.jsonl" if role == "retrained" else "rows.jsonl")
    gain = 100 * statistics.mean(beyond_ascii(own, "rougeL_f1", stem=False))
    assert results(golden_run)[role]["metrics"][name] - gain == pytest.approx(
        golden["eval_model_output"][METRICS[name]], abs=1e-4
    )


@pytest.mark.parametrize("role", ["final", "retrained"])
def test_golden_membership(golden_run: Path, shared: Path, role: str):
    """AUCs of the attacks that muse_bench has too, turned round, and PrivLeak with the retrained model's own AUC."""
    which = {"final": "target", "retrained": "retain"}[role]
    golden = json.loads((shared / f"goldens/muse/A/muse_{which}.json").read_text())["privleak"]
    metrics = results(golden_run)[role]["metrics"]
    for ours, theirs in (("mia_loss", "PPL"), ("mia_zlib", "PPL/zlib"), ("mia_min_k", "Min-40%")):
        assert 1 - metrics[ours] == pytest.approx(golden["auc"][f"forget_holdout_{theirs}"], abs=1e-4)
    if role == "final":
        assert metrics["privleak"] == pytest.approx(golden["value"]["privleak_with_retain_model_auc"], abs=1e-4)
    else:
        assert "privleak" not in metrics


@pytest.mark.parametrize("split", ["forget", "holdout"])
def test_golden_text_scores(golden_run: Path, shared: Path, split: str):
    """Loss, Min-K% and zlib score of every text."""
    golden = json.loads((shared / "goldens/muse/A/muse_target.json").read_text())["privleak"]["texts"][split]
    for ours, theirs in zip(rows(golden_run, split), golden, strict=True):
        assert ours["answer_nll"] == pytest.approx(theirs["PPL"], abs=1e-4)
        assert ours["mia_min_k"] == pytest.approx(theirs["Min-40%"], abs=1e-4)
        assert ours["mia_zlib"] == pytest.approx(theirs["PPL/zlib"], abs=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_golden_generations(golden_run: Path, shared: Path, name: str):
    """The same tokens, scores and references in every row that is no near tie."""
    golden = json.loads((shared / "goldens/muse/A/muse_target.json").read_text())["rows"][METRICS[name]]
    tokenizer = AutoTokenizer.from_pretrained(shared / "goldens/A/target")
    compared = 0
    own = rows(golden_run, name)
    for ours, theirs, gain in zip(own, golden, beyond_ascii(own, "rougeL_f1", stem=False), strict=True):
        # Their texts went through a clean-up of spaces, which ROUGE does not see.
        assert tidy(ours["answer"]) == tidy(theirs["gt"])
        if theirs["min_top2_logit_gap"] >= NEAR_TIE:
            generated = tokenizer.decode(theirs["output_ids"], skip_special_tokens=True)
            assert ours["generation"] == cut_answer(generated).strip()
            assert ours["rougeL_f1"] - gain == pytest.approx(theirs["rougeL"], abs=1e-6)
            compared += 1
    assert compared >= len(golden) - 1


def tidy(text: str) -> str:
    return "".join(text.split())


def test_golden_stop_words(shared: Path):
    cases = json.loads((shared / "goldens/muse/A/muse_target.json").read_text())["stop_string_cases"]
    assert len(cases) == 11
    assert [cut_answer(case["in"]) for case in cases] == [case["out"] for case in cases]


def test_golden_prompt(shared: Path):
    """The questions after the examples, letter by letter."""
    golden = json.loads((shared / "goldens/muse/A/muse_target.json").read_text())
    data = MuseData(str(shared / "goldens/muse/corpus"), model=str(shared / "goldens/A/target"))
    data.setup("test")
    parts = {part.name: part for part in data.evaluation().splits}
    for name, key in METRICS.items():
        prompts = parts[name].generation.prompts
        assert [len(ids) for ids in prompts] == [row["prompt_tokens"] for row in golden["rows"][key]]
        if key in golden["prompt_of_row_0"]:
            text = data.tokenizer.decode(prompts[0], skip_special_tokens=True)
            assert text == golden["prompt_of_row_0"][key]


def test_cut_of_the_true_continuation(model_folder: Path):
    """By hand: five generated tokens are compared with four of the text, the first place being that of BOS."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    row = {"prompt": "Where was", "gt": " born in the very old city of Quito"}
    part = MuseData(model=str(model_folder), eval=EvalOptions(max_new_tokens=5)).verbmem([row])
    kept = tokenizer(row["gt"], add_special_tokens=False)["input_ids"][:4]
    assert part.texts[0]["answer"] == tokenizer.decode(kept)
    assert part.generation.max_new_tokens == 5
    assert MuseData(model=str(model_folder)).verbmem([row]).generation.max_new_tokens == 128


def test_fit(muse_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Unlearns text in blocks, measures every epoch, exports the best one."""
    folder = tmp_path / "run"
    main(["fit", *muse_options, "--run_dir", str(folder), "--debug"])
    content = results(folder)
    assert content["finished"]
    for entry in (content["start"], content["final"], *content["epochs"]):
        metrics = entry["metrics"]
        assert set(metrics) >= {*METRICS, "balance"}
        parts = [metrics["knowmem_retain"], 100 - metrics["knowmem_forget"], 100 - metrics["verbmem_forget"]]
        assert metrics["balance"] == pytest.approx(statistics.harmonic_mean(parts), abs=1e-9)
    assert content["counts"]["verbmem_forget"] == 4
    assert content["counts"]["knowmem_forget"] == 18
    values = [e["metrics"]["balance"] for e in content["epochs"]]
    assert content["exported_epoch"] == 1 + values.index(max(values))
    out = capsys.readouterr().out
    assert "text, blocks of at most 64 tokens" in out
    for title in ("VerbMem forget", "KnowMem forget", "KnowMem retain"):
        assert f"\n  {title} (0 to 100) " in out


@pytest.mark.parametrize("objective", ["NPO", "SimNPORawLogits"])
def test_other_objectives(muse_options: list[str], tmp_path: Path, objective: str):
    """Also a row a document, and one optimizer step."""
    options = ["--model.objective", objective, "--data.rows", "documents", "--data.max_length", "128"]
    options += ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1", "--eval.start", "false"]
    main(["fit", *muse_options, *options, "--run_dir", str(tmp_path / "run"), "--export.best", "null", "--debug"])
    assert results(tmp_path / "run")["finished"]


def test_start_models_are_made_of_text(muse_options: list[str], tmp_path: Path):
    options = ["--model.objective", "FineTune", "--model.retain_loss", "null", "--data.forget_split"]
    options += ["raw/forget+raw/retain1+raw/retain2", "--eval.start", "false", "--eval.final", "false"]
    options += ["--trainer.max_epochs", "1", "--export.best", "null", "--trainer.limit_val_batches", "0"]
    main(["fit", *muse_options, *options, "--run_dir", str(tmp_path / "run"), "--debug"])
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("verbmem/forget.json", [{"prompt": " ", "gt": "x"}], "verbmem/forget row 0, .* expected text as prompt"),
        ("knowmem/forget_qa.json", [{"question": "q"}], "has no column 'answer'"),
        ("knowmem/forget_qa_icl.json", [{"question": "q", "answer": 3}], "knowmem/forget_qa_icl row 0, .* got 3"),
    ],
)
def test_unusable_data(muse_folder: Path, model_folder: Path, tmp_path: Path, name: str, content: Any, message: str):
    shutil.copytree(muse_folder, tmp_path / "broken")
    (tmp_path / "broken" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        MuseData(str(tmp_path / "broken"), model=str(model_folder), eval=EvalOptions(max_new_tokens=5)).setup("test")


def test_holdout_text_that_is_forgotten(muse_folder: Path, model_folder: Path, tmp_path: Path):
    shutil.copytree(muse_folder, tmp_path / "broken")
    shutil.copy(muse_folder / "privleak" / "forget.json", tmp_path / "broken" / "privleak" / "holdout.json")
    options = EvalOptions(max_new_tokens=5)
    data = MuseData(str(tmp_path / "broken"), model=str(model_folder), truncate=True, eval=options)
    with pytest.raises(UserError, match="4 of 4 forget rows are also holdout rows"):
        data.setup("test")


def test_log_of_the_retrained_model(muse_options: list[str], other_folder: Path, tmp_path: Path):
    """PrivLeak from a run folder of the retrained model is PrivLeak with that model; without either it says why not."""
    retrained = str(other_folder)
    main(["test", *muse_options, "--model.name", retrained, "--run_dir", str(tmp_path / "log"), "--debug"])
    assert "--eval.retain_log" in results(tmp_path / "log")["unavailable"]["privleak"]
    assert "privleak" not in results(tmp_path / "log")["final"]["metrics"]
    found = []
    for name, value in (("retain_log", str(tmp_path / "log")), ("retrained", retrained)):
        main(["test", *muse_options, f"--eval.{name}", value, "--run_dir", str(tmp_path / name), "--debug"])
        found.append(results(tmp_path / name)["final"]["metrics"]["privleak"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    auc, reference = (results(tmp_path / n)["final"]["metrics"]["mia_min_k"] for n in ("retrained", "log"))
    assert found[0] == pytest.approx((reference - auc) / (1 - reference) * 100, abs=1e-6)


def test_prompts_leave_room(muse_folder: Path, model_folder: Path):
    data = MuseData(str(muse_folder), model=str(model_folder))
    with pytest.raises(
        UserError, match=r"verbmem_forget: the longest prompt has \d+ tokens and 128 more are generated"
    ):
        data.setup("test")
