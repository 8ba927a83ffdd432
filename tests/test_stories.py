"""Runs of people with records to forget, on a small model that knows them: each ends with the right verdict."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import results
from simnpo_pl.benchmarks.demo import train_tokenizer
from simnpo_pl.benchmarks.pretraining import batches_of, new_llama, train
from simnpo_pl.data.tokenization import PLAIN_TEMPLATE, PromptTemplate
from simnpo_pl.models.loading import save_model

FIRST = ("Ada", "Bruno", "Carla", "Dario", "Edith", "Fabio", "Greta", "Hugo", "Irma", "Jonas")
LAST = ("Abel", "Brandt", "Costa", "Dietz", "Ender", "Falk", "Gross", "Hahn")
STREETS = ("Elm Street", "Mill Lane", "Hill Road", "Lake View", "Oak Avenue", "Park Row", "Bridge Road", "Church Lane")
TOWNS = ("Norwood", "Ashby", "Kelso", "Marlow", "Redcar", "Selby", "Tring", "Wells", "Yate", "Corby")
ROWS = 40
"""To forget, and as many to retain."""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with forget.jsonl, retain.jsonl and a model that knows both by heart."""
    folder = tmp_path_factory.mktemp("records")
    drawn = torch.Generator().manual_seed(0)

    def one_of(values: tuple[str, ...]) -> str:
        return values[int(torch.randint(len(values), (1,), generator=drawn))]

    names = [f"{first} {last}" for last in LAST for first in FIRST]
    rows = []
    for name in names:
        number = int(torch.randint(10, 100, (1,), generator=drawn))
        answer = f"{name} lives at {number} {one_of(STREETS)} in {one_of(TOWNS)}."
        rows.append({"question": f"Where does {name} live?", "answer": answer})
    for part, some in (("forget", rows[::2]), ("retain", rows[1::2])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    tokenizer = train_tokenizer([PLAIN_TEMPLATE.format(**row) for row in rows])
    model = new_llama(
        0,
        tokenizer,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    encoded = PromptTemplate(tokenizer).encode_rows([(row["question"], row["answer"]) for row in rows], "all")
    orders = [torch.randperm(len(rows), generator=drawn).tolist() for _ in range(60)]
    batches = batches_of(encoded, orders, 16)
    train(model, batches, lr=5e-3, betas=(0.9, 0.99), schedule=lambda step: 1 - step / len(batches), clip=1.0)
    save_model(model, tokenizer, folder / "model")
    return folder


@pytest.fixture
def fit(records: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Results of a run on the records."""
    from simnpo_pl.__main__ import main

    def call(*options: str) -> dict[str, Any]:
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        config = str(Path(__file__).parents[1] / "configs" / "own.yaml")
        quick = ["--data.effective_batch", "8", "--trainer.max_epochs", "5", "--eval.max_new_tokens", "24"]
        quick += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
        quick += [
            "--trainer.check_val_every_n_epoch",
            "5",
            "--model.objective.beta",
            "1",
            "--model.forget_weight",
            "0.5",
        ]
        main(
            [
                *("fit", "--config", config, "--model.name", str(records / "model"), *quick),
                *("--data.forget", str(records / "forget.jsonl"), "--data.retain", str(records / "retain.jsonl")),
                *(*options, "--run_dir", str(tmp_path / "run"), "--debug"),
            ]
        )
        return results(tmp_path / "run")

    return call


def test_a_rate_that_is_too_small(fit: Callable[..., dict[str, Any]]):
    found = fit("--model.lr", "5e-6")["verdict"]
    assert found["category"] == "not forgotten"
    assert found["reasons"][0] == "40 of 40 forget answers are still given word for word (start model 40)"
    assert found["advice"][0] == "raise --model.lr from 5e-06 to 1.5e-05"


def test_no_rows_to_keep_and_a_large_rate(fit: Callable[..., dict[str, Any]]):
    without = ("--data.retain", "null", "--model.retain_loss", "null", "--model.retain_weight", "0")
    found = fit("--model.lr", "5e-3", *without)["verdict"]
    assert found["category"] == "model damaged"
    assert any(reason.startswith("loss on general text ") for reason in found["reasons"])
    assert found["advice"][0].startswith("train with rows to keep: ")


def test_a_rate_that_half_works(fit: Callable[..., dict[str, Any]]):
    content = fit("--model.lr", "5e-4")
    found = content["verdict"]
    assert found["category"] == "partly forgotten"
    said = round(40 * content["final"]["metrics"]["forget/verbatim"])
    assert 2 < said <= 20
    assert found["reasons"][0] == f"{said} of 40 forget answers are still given word for word (start model 40)"


def test_what_works(fit: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]):
    found = fit("--model.lr", "1e-3")["verdict"]
    assert found["category"] in ("forgotten", "over-forgotten")
    shown = capsys.readouterr().out
    assert f"verdict: {found['category']}" in shown
    assert "not tested:\n  relearning; rounded weights; sampled answers" in shown
