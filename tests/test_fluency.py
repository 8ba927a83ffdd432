"""Fluency of forget answers: a tiny random classifier, its softmax by hand, and whole runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertTokenizerFast

from helpers import results
from simnpo_pl.evaluation.fluency import FluencyClassifier
from simnpo_pl.utils.errors import UserError

TEXTS = ["Jaime writes in Spanish.", "", "the the the the the the the the the the the the the", "Who?"]


@pytest.fixture(scope="module")
def classifier_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labels, at most 12 positions."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        initializer_range=0.5,
        id2label={0: "noise", 1: "clean", 2: "word salad"},
        label2id={"noise": 0, "clean": 1, "word salad": 2},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("padded", [True, False])
def test_probability_is_the_labels_softmax(classifier_folder: Path, tmp_path: Path, padded: bool):
    """One text at a time from the model's logits; also by a tokenizer without padding token."""
    folder = tmp_path / "copy"
    shutil.copytree(classifier_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not padded:
        tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    expected = []
    for text in TEXTS:
        if not text:
            expected.append(0.0)
            continue
        with torch.no_grad():
            e = model(torch.tensor([tokenizer(text)["input_ids"][:12]])).logits[0].exp()
        expected.append((e[1] / e.sum()).item())
    rate = FluencyClassifier(str(folder), "clean", batch=3)
    assert rate(TEXTS) == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.01
    salad = FluencyClassifier(str(folder), "word salad")
    assert salad([TEXTS[0]])[0] != pytest.approx(expected[0], abs=1e-3)
    assert rate([]) == []


@pytest.mark.parametrize("second", [None, ["hello", "hello"]])
def test_a_blank_text_is_not_fluent(tmp_path: Path, second: list[str] | None):
    """Also where the tokenizer makes tokens of its own for the beginning and the end."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=6, **size, id2label={0: "noise", 1: "clean"}, label2id={"noise": 0, "clean": 1})
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    blank, said = FluencyClassifier(str(tmp_path), "clean")([" \n", "hello"], second)
    assert blank == 0 < said


def test_mistakes(classifier_folder: Path, model_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"'fluent', its labels are noise, clean, word salad: name the right one"):
        FluencyClassifier(str(classifier_folder), "fluent")
    with pytest.raises(UserError, match=r"--eval.fluency_classifier: folder ./none does not exist"):
        FluencyClassifier("./none", "clean")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="is no text classifier that can be loaded"):
        FluencyClassifier(str(tmp_path), "clean")
    # A language model's body would get a head of random weights.
    with pytest.raises(UserError, match=r"lacks weights of a text classifier \(score.weight\)"):
        FluencyClassifier(str(model_folder), "LABEL_0")


def test_in_a_run(cli: Callable[..., None], classifier_folder: Path, tmp_path: Path):
    """Every generated forget answer is rated, by row and in the public format; other splits are not."""
    rate = ("--eval.fluency_classifier", str(classifier_folder), "--eval.prompts_per_batch", "4")
    cli("test", *rate, "--eval.generate_rows", "6", "--run_dir", str(tmp_path / "run"))
    content = results(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    rated = [row for row in rows if "fluency" in row]
    assert [(row["split"], row["index"]) for row in rated] == [("forget", i) for i in range(6)]
    texts = [row["generation"] for row in rated]
    expected = FluencyClassifier(str(classifier_folder), "clean")(texts)
    assert [row["fluency"] for row in rated] == pytest.approx(expected, abs=1e-6)
    assert content["final"]["metrics"]["forget/fluency"] == pytest.approx(sum(expected) / 6)
    assert content["counts"]["forget/fluency"] == 6
    assert "forget/fluency" not in content["unavailable"]
    public: dict[str, Any] = json.loads((tmp_path / "run" / "TOFU_EVAL.json").read_text())["forget_Q_A_gibberish"]
    assert public["value_by_index"]["5"] == {"score": rated[5]["fluency"], "generation": texts[5]}


def test_reasons(cli: Callable[..., None], classifier_folder: Path, tmp_path: Path):
    cli("test", "--eval.generate_rows", "0", "--run_dir", str(tmp_path / "none"))
    reason = results(tmp_path / "none")["unavailable"]["forget/fluency"]
    assert reason == "no classifier; give --eval.fluency_classifier FOLDER"
    options = ("--eval.fluency_classifier", str(classifier_folder), "--eval.generate_rows", "0")
    cli("test", *options, "--run_dir", str(tmp_path / "silent"))
    reason = results(tmp_path / "silent")["unavailable"]["forget/fluency"]
    assert reason == "no answers are generated, see --eval.generate_rows"
