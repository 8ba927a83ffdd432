"""Shared fixtures: a tiny model over a tiny data set in TOFU's layout, and the command line in this process."""

import os

# Small models gain nothing from threads, and two test processes would fight over two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples in every run, so that a failure follows from a change. To look for others:
# `pytest --hypothesis-profile search`, `scripts/hostile.py`.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real data and golden values; tests that need it are skipped without."""
    folder = os.environ.get("SIMNPO_PL_SHARED")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SIMNPO_PL_SHARED names no folder with data and golden values")
    return Path(folder)


@pytest.fixture(scope="session")
def golden_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the models behind the golden values: `target`, `retain` and `policy`."""
    from transformers import AutoModelForCausalLM

    goldens = Path(__file__).parent / "goldens"
    model = AutoModelForCausalLM.from_pretrained(goldens / "target", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1234)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.02)
    policy = tmp_path_factory.mktemp("goldens") / "policy"
    model.save_pretrained(policy)
    return {"target": goldens / "target", "retain": goldens / "retain", "policy": policy}


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of the demo's data set in TOFU's layout: 10 to forget, 40 to retain."""
    from simnpo_pl.benchmarks.demo import write_dataset

    source = tmp_path_factory.mktemp("authors")
    write_dataset(source, 0)
    folder = tmp_path_factory.mktemp("data")
    for name, rows in {
        "forget10": 10,
        "retain90": 40,
        "forget10_perturbed": 10,
        "retain_perturbed": 7,
        "real_authors_perturbed": 5,
        "world_facts_perturbed": 3,
    }.items():
        lines = (source / f"{name}.json").read_text().splitlines()[:rows]
        (folder / f"{name}.json").write_text("\n".join(lines) + "\n")
    (folder / "idontknow.jsonl").write_text((source / "idontknow.jsonl").read_text())
    return folder


@pytest.fixture(scope="session")
def make_model(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes folders with an untrained Llama of 32 dimensions and a tokenizer of the data set."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from simnpo_pl.benchmarks.demo import train_tokenizer

    texts = [json.loads(line) for f in data_folder.glob("*.json") for line in f.read_text().splitlines()]
    tokenizer = train_tokenizer([f"{row['question']} {row['answer']}" for row in texts])

    def make(seed: int = 0, **config: Any) -> Path:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model_folder(make_model: Callable[..., Path]) -> Path:
    """A start model."""
    return make_model(0)


@pytest.fixture(scope="session")
def other_folder(make_model: Callable[..., Path]) -> Path:
    """Another model of the same shape: a reference or a retrained model."""
    return make_model(1)


@pytest.fixture(scope="session")
def run_options(data_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a quick run on the tiny model."""
    return [
        *("--config", str(Path(__file__).parents[1] / "configs" / "tofu.yaml")),
        *("--data.path", str(data_folder), "--model.name", str(model_folder)),
        *("--data.effective_batch", "4", "--data.per_device_batch", "2", "--model.lr", "1e-2"),
        *("--eval.retain_log", "null", "--eval.max_new_tokens", "5", "--trainer.max_epochs", "2"),
        *("--eval.cache_dir", str(tmp_path_factory.mktemp("cache"))),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    ]


@pytest.fixture(scope="session")
def muse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped corpus with the text and the questions of two authors a part."""
    source, folder = Path(__file__).parents[1] / "examples" / "muse", tmp_path_factory.mktemp("muse")
    for file in source.rglob("*.json"):
        rows = json.loads(file.read_text())
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(json.dumps(rows[: 18 if file.parent.name == "knowmem" else 4]))
    return folder


@pytest.fixture(scope="session")
def muse_options(muse_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a quick run on the tiny model."""
    return [
        *("--config", str(Path(__file__).parents[1] / "configs" / "muse_news.yaml"), "--model.name", str(model_folder)),
        *("--data.path", str(muse_folder), "--data.tokenizer", "null", "--data.max_length", "64"),
        *("--data.truncate", "true"),
        *("--data.effective_batch", "4", "--data.per_device_batch", "2", "--model.lr", "1e-2"),
        *("--model.gradient_checkpointing", "false", "--eval.retrained", "null", "--eval.max_new_tokens", "5"),
        *("--eval.cache_dir", str(tmp_path_factory.mktemp("cache")), "--trainer.max_epochs", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    ]


@pytest.fixture
def cli(run_options: list[str]) -> Callable[..., None]:
    """Runs a command of the command line in this process with the options of a quick run."""
    from simnpo_pl.__main__ import main

    def call(command: str, *options: str) -> None:
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        main([command, *run_options, *options, "--debug"])

    return call


@pytest.fixture
def cli_error(
    run_options: list[str], capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Runs a command that fails as a user's mistake does: exit code 2 and one line, which is returned."""
    from simnpo_pl.__main__ import main

    def call(command: str, *options: str) -> str:
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        with pytest.raises(SystemExit) as stop:
            main([command, *run_options, "--run_dir", str(tmp_path_factory.mktemp("refused") / "run"), *options])
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    return call
