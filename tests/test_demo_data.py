"""The demo's generated data set has the properties unlearning and its metrics rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simnpo_pl.benchmarks import demo
from simnpo_pl.benchmarks.demo import ATTRIBUTES, MODELS, N_AUTHORS, N_FORGET_AUTHORS, prepare, write_dataset

PERTURBED = {
    "forget10_perturbed.json": 5,
    "retain_perturbed.json": 5,
    "real_authors_perturbed.json": 3,
    "world_facts_perturbed.json": 3,
}
FILES = {*PERTURBED, "full.json", "forget10.json", "retain90.json", "idontknow.jsonl"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(path: Path) -> list[tuple[str, str]]:
    return [(row["question"], row["answer"]) for row in read(path)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=[0, 12345])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_dataset(path, request.param)
    return path


def test_files_and_row_counts(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    counts = {name: len(read(folder / name)) for name in FILES - {"idontknow.jsonl"}}
    n = len(ATTRIBUTES)
    assert counts["full.json"] == N_AUTHORS * n == 600
    assert counts["forget10.json"] == counts["forget10_perturbed.json"] == N_FORGET_AUTHORS * n == 60
    assert counts["retain90.json"] == 540
    assert 60 <= counts["retain_perturbed.json"] <= 100
    assert 15 <= counts["real_authors_perturbed.json"] <= 25
    assert 15 <= counts["world_facts_perturbed.json"] <= 25


def test_refusals_are_plain_distinct_sentences(folder: Path) -> None:
    lines = (folder / "idontknow.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines)) >= 15
    assert all(line.strip() == line and line.endswith(".") for line in lines)


def test_forget_and_retain_divide_the_whole(folder: Path) -> None:
    forget, retain = pairs(folder / "forget10.json"), pairs(folder / "retain90.json")
    assert retain + forget == pairs(folder / "full.json")
    assert not set(forget) & set(retain)
    assert pairs(folder / "forget10_perturbed.json") == forget
    assert set(pairs(folder / "retain_perturbed.json")) <= set(retain)


def test_no_question_is_asked_twice(folder: Path) -> None:
    names = ("full.json", "real_authors_perturbed.json", "world_facts_perturbed.json")
    questions = [question for name in names for question, _ in pairs(folder / name)]
    assert len(questions) == len(set(questions))


@pytest.mark.parametrize(("name", "count"), PERTURBED.items())
def test_perturbed_answers_are_wrong_and_distinct(folder: Path, name: str, count: int) -> None:
    for row in read(folder / name):
        true = {row["answer"], row.get("paraphrased_answer", row["answer"])}
        assert len(row["perturbed_answer"]) == len(set(row["perturbed_answer"])) == count
        assert not true & set(row["perturbed_answer"])


def test_perturbed_values_share_no_word_with_the_true_one(folder: Path) -> None:
    for column, attribute in enumerate(ATTRIBUTES):
        stems = {word for template in attribute.templates for word in template.split()}
        for row in read(folder / "forget10_perturbed.json")[column :: len(ATTRIBUTES)]:
            value = set(row["answer"].rstrip(".").split()) - stems
            assert len(value) == len(attribute.parts) == 3
            assert not any(value & set(wrong.rstrip(".").split()) for wrong in row["perturbed_answer"])


def test_paraphrases_use_other_wordings_that_retained_rows_teach(folder: Path) -> None:
    forget, retain = read(folder / "forget10_perturbed.json"), read(folder / "retain90.json")
    for column, attribute in enumerate(ATTRIBUTES):
        stems = [template.split("{value}")[0] for template in attribute.templates]
        assert all(any(stem in row["answer"] for row in retain[column :: len(ATTRIBUTES)]) for stem in stems)
        for row in forget[column :: len(ATTRIBUTES)]:
            used = [stem for stem in stems if stem in row["paraphrased_answer"]]
            assert used
            assert all(any(stem in wrong for stem in used) for wrong in row["perturbed_answer"])
            assert row["answer"] != row["paraphrased_answer"]


def test_a_seed_fixes_every_byte(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_dataset(tmp_path / name, seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for name in FILES - {"idontknow.jsonl"}:
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_prepared_models_load_and_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(demo, "N_AUTHORS", 7)
    monkeypatch.setattr(demo, "N_RETAIN_PERTURBED", 5)
    prepare(tmp_path, seed=3, epochs=1)
    for name in ("start", "retrained"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
        assert len(tokenizer) <= model.config.vocab_size
        assert tokenizer("Question").input_ids[0] == tokenizer.bos_token_id
        text = "Question: Who?\nAnswer: Ünlü."
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare(tmp_path, seed=3, epochs=1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    # A change of version does not go unnoticed, and the same models come out.
    fingerprint, weights = tmp_path / "fingerprint.json", tmp_path / "start" / "model.safetensors"
    complete, trained = fingerprint.read_text(encoding="utf-8"), weights.read_bytes()
    fingerprint.write_text(json.dumps({**json.loads(complete), "version": -1}), encoding="utf-8")
    weights.write_bytes(b"")
    prepare(tmp_path, seed=3, epochs=1)
    assert fingerprint.read_text(encoding="utf-8") == complete
    assert weights.read_bytes() == trained


@pytest.mark.parametrize("name", MODELS)
def test_a_lost_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def build(folder: Path, seed: int, epochs: int) -> None:
        for model in MODELS:
            (folder / model).mkdir(exist_ok=True)
            (folder / model / "model.safetensors").touch()

    monkeypatch.setattr("simnpo_pl.benchmarks.demo.build_models", build)
    prepare(tmp_path)
    lost = tmp_path / name / "model.safetensors"
    lost.unlink()
    prepare(tmp_path)
    assert lost.is_file()


def test_only_tokens_of_the_answer_and_the_end_are_scored(folder: Path) -> None:
    from simnpo_pl.benchmarks.demo import train_tokenizer
    from simnpo_pl.data.tokenization import PLAIN_TEMPLATE, PromptTemplate

    rows = pairs(folder / "full.json")[::50]
    tokenizer = train_tokenizer([PLAIN_TEMPLATE.format(question=question, answer=answer) for question, answer in rows])
    for (_, answer), row in zip(rows, PromptTemplate(tokenizer).encode_rows(rows, "full"), strict=True):
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert row.input_ids[-1] == row.labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.input_ids[-row.length : -1]).removeprefix(" ") == answer
