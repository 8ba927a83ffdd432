"""Every benchmark's own config trains on one batch and is evaluated again from the exported model, on tiny data."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from helpers import command_on_gpu, on_second_device, results
from simnpo_pl import benchmarks
from simnpo_pl.__main__ import main
from simnpo_pl.benchmarks.demo import EPOCHS, VERSION
from simnpo_pl.benchmarks.markov import SIZES, Size

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("demo", "markov", "muse_books", "muse_news", "own", "tofu", "wmdp_bio", "wmdp_cyber")
FAST = ("demo", "markov", "muse_news", "own", "wmdp_bio")
"""On the second device: one of each benchmark; TOFU has tests of its own."""


def test_none_is_left_out():
    named = {yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]["class_path"] for name in NAMES}
    assert named == set(benchmarks.__all__)


@pytest.fixture
def sources(
    data_folder: Path, muse_folder: Path, model_folder: Path, other_folder: Path, tmp_path: Path
) -> dict[str, dict[str, str]]:
    """Benchmark to the data and models that take the place of the real ones."""
    demo = tmp_path / "demo"
    shutil.copytree(data_folder, demo)
    for name, folder in (("start", model_folder), ("retrained", other_folder)):
        shutil.copytree(folder, demo / name)
    (demo / "fingerprint.json").write_text(json.dumps({"version": VERSION, "seed": 0, "epochs": EPOCHS}))
    for name, part in (("forget", "forget"), ("retain", "retain1")):
        texts = json.loads((muse_folder / "raw" / f"{part}.json").read_text())
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = {"--data.forget": str(tmp_path / "forget.jsonl"), "--data.retain": str(tmp_path / "retain.jsonl")}
    muse = {"--data.path": str(muse_folder), "--data.tokenizer": "null", "--data.max_length": "64"}
    muse |= {"--data.truncate": "true", "--eval.retrained": "null"}
    wmdp = {**text, "--data.forget_split": "null", "--data.retain_split": "null", "--data.max_length": "64"}
    chain = str(tmp_path / "chains")
    return {
        "demo": {"--data.path": str(demo), "--model.name": f"{demo}/start", "--eval.retrained": f"{demo}/retrained"},
        "markov": {
            "--data.path": chain,
            "--model.name": f"{chain}/start",
            "--eval.retrained": f"{chain}/retrained",
        },
        "muse": muse,
        "own": {**text, "--data.max_length": "64"},
        "tofu": {"--data.path": str(data_folder), "--eval.retain_log": "null"},
        "wmdp": {**wmdp, "--data.eval_rows": "4"},
    }


@pytest.mark.parametrize(
    ("accelerator", "name"),
    [
        *(("cpu", name) for name in NAMES),
        *(pytest.param("gpu", name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES),
    ],
)
def test_one_batch(
    sources: dict[str, dict[str, str]],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accelerator: str,
    name: str,
):
    """On the CPU, and in bf16-mixed on the second device in a GPU's place."""
    monkeypatch.setitem(SIZES, "small", Size(sequences=80, width=8, epochs=1, test_rows=4))
    monkeypatch.delenv("SIMNPO_PL_RUN_DIR", raising=False)
    own = {"--model.name": str(model_folder), **sources[name.split("_")[0]]}
    quick = {"--data.effective_batch": "2", "--data.per_device_batch": "2", "--trainer.accelerator": accelerator}
    quick |= {"--eval.cache_dir": str(tmp_path / "cache"), "--trainer.enable_progress_bar": "false"}
    if name != "markov":
        quick["--eval.max_new_tokens"] = "4"

    def call(command: str, **changed: str) -> dict:
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        folder = tmp_path / command
        options = {**own, **quick, **{f"--{option}": value for option, value in changed.items()}}
        words = [word for option in options.items() for word in option]
        words = [command, "--config", str(CONFIGS / f"{name}.yaml"), *words, "--run_dir", str(folder), "--debug"]
        if accelerator == "cpu":
            main(words)
        else:
            code, text = on_second_device(command_on_gpu, words)
            assert code == 0, text
            assert ", second:0, precision bf16-mixed" in text
        return results(folder)

    fitted = call("fit", **{"trainer.max_steps": "1", "model.gradient_checkpointing": "false", "model.lr": "1e-3"})
    assert fitted["finished"]
    assert len((tmp_path / "fit" / "history.jsonl").read_text().splitlines()) == 1
    found = fitted["final"]["metrics"]
    assert found != fitted["start"]["metrics"]
    assert set(found) & set(fitted["unavailable"]) == set()
    tested = call("test", **{"model.name": str(tmp_path / "fit" / "model")})["final"]["metrics"]
    assert tested == pytest.approx(found, rel=1e-4, abs=1e-6)
