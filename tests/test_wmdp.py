"""WMDP: whole runs on documents, and accuracy by lm-evaluation-harness on a local four-choice task."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from simnpo_pl.__main__ import main
from simnpo_pl.benchmarks import WmdpData
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.loading import load_causal_lm, load_tokenizer, save_model
from simnpo_pl.models.lora import LoraOptions, add_adapter
from simnpo_pl.studies import parse
from simnpo_pl.studies.lm_eval import evaluate
from simnpo_pl.utils.errors import UserError

ROOT = Path(__file__).parents[1]
CHOICES = ("A", "B", "C", "D")


def documents(split: str) -> list[str]:
    return json.loads((ROOT / "examples" / "muse" / "raw" / f"{split}.json").read_text())[:6]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents to forget as JSON lines, documents to retain as a text file, headings among both."""
    folder = tmp_path_factory.mktemp("wmdp")
    texts = {name: documents(name) for name in ("forget", "retain1")}
    lines = [{"title": "Paper", "text": text} for text in ["= Heading =", *texts["forget"]]]
    (folder / "forget.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "retain.txt").write_text("\n\n".join(["= Heading =", *texts["retain1"]]))
    return folder


@pytest.fixture(scope="module")
def wmdp_run(corpus: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps."""
    folder = tmp_path_factory.mktemp("runs") / "wmdp"
    main(
        [
            *("fit", "--config", str(ROOT / "configs" / "wmdp_bio.yaml"), "--run_dir", str(folder)),
            *("--model.name", str(model_folder), "--model.gradient_checkpointing", "false", "--model.lr", "1e-2"),
            *("--data.forget", str(corpus / "forget.jsonl"), "--data.retain", str(corpus / "retain.txt")),
            *("--data.retain_split", "null", "--data.max_length", "100", "--data.eval_rows", "4"),
            *("--trainer.max_steps", "3", "--model.warmup_steps", "1", "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false", "--eval.cache_dir", "null", "--debug"),
        ]
    )
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def document_loss(model: Any, tokenizer: Any, text: str, length: int) -> float:
    """Loss of one document cut to a length, without any padding."""
    ids = torch.tensor([tokenizer(text)["input_ids"][:length]])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def test_fit(wmdp_run: Path, model_folder: Path):
    """Losses are those of the documents alone, headings left out, padding never scored."""
    content = results(wmdp_run)
    assert content["finished"]
    assert content["counts"] == {"forget/nll": 4, "retain/nll": 4}
    assert "lm-eval RUN" in content["unavailable"]["accuracy"]
    for role, folder in (("start", model_folder), ("final", wmdp_run / "model")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for side, name in (("forget", "forget"), ("retain", "retain1")):
            texts = documents(name)[:4]
            expected = [document_loss(model, tokenizer, text, 100) for text in texts]
            assert len({len(tokenizer(text)["input_ids"]) for text in texts}) > 1
            assert content[role]["metrics"][f"{side}/nll"] == pytest.approx(sum(expected) / 4, rel=1e-5)
    moved = {n: content["final"]["metrics"][n] - content["start"]["metrics"][n] for n in ("forget/nll", "retain/nll")}
    assert moved["forget/nll"] > moved["retain/nll"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_characters": 10**6}, r"none of 7 documents has 1000000 characters; lower --data.min_characters"),
        ({"eval_rows": 0}, r"--data.eval_rows must be at least 1, got 0"),
        ({"truncate": False, "max_length": 20}, r"forget texts are longer than max_length = 20 tokens"),
    ],
)
def test_unusable(corpus: Path, model_folder: Path, options: dict[str, Any], message: str):
    settings = {"retain": str(corpus / "retain.txt"), "retain_split": None, "truncate": True, **options}
    with pytest.raises(UserError, match=message):
        WmdpData(str(corpus / "forget.jsonl"), model=str(model_folder), eval=EvalOptions(), **settings).setup("test")


def test_documents_that_are_no_text(model_folder: Path, tmp_path: Path):
    (tmp_path / "forget.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(UserError, match=r"forget.jsonl row 0, counted from 0: expected a text, got 3"):
        WmdpData(str(tmp_path / "forget.jsonl"), model=str(model_folder)).setup("test")


# -- lm-evaluation-harness -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions(corpus: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of the harness in the form of WMDP's, its questions made of the demo's."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.loads(line) for line in (data_folder / "forget10_perturbed.json").read_text().splitlines()]
    asked = []
    for number, row in enumerate(rows):
        answer = number % 4
        choices = row["perturbed_answer"][:3]
        asked.append({"question": row["question"], "choices": [*choices[:answer], row["answer"], *choices[answer:]]})
        asked[-1]["answer"] = answer
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question.strip()}}\n"
        + "".join(f"{name}. {{{{choices[{i}]}}}}\n" for i, name in enumerate(CHOICES))
        + "Answer:",
        "doc_to_choice": list(CHOICES),
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (folder / "local_choice.yaml").write_text(yaml.safe_dump(task))
    return folder


def accuracy(folder: Path, questions: Path) -> float:
    """Share of questions where the right letter has the highest summed log-prob, computed by hand."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    rows = [json.loads(line) for line in (questions / "questions.jsonl").read_text().splitlines()]
    for row in rows:
        text = row["question"] + "\n" + "".join(f"{n}. {c}\n" for n, c in zip(CHOICES, row["choices"], strict=True))
        prompt = tokenizer(text + "Answer:")["input_ids"]
        scores = []
        for name in CHOICES:
            whole = tokenizer(f"{text}Answer: {name}")["input_ids"]
            assert whole[: len(prompt)] == prompt
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logps[t - 1, whole[t]].item() for t in range(len(prompt), len(whole))))
        right += max(range(4), key=scores.__getitem__) == row["answer"]
    return right / len(rows)


def test_accuracy(wmdp_run: Path, questions: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    """The harness' accuracy of both models is that computed by hand; what was in results.json stays."""
    before = results(wmdp_run)
    options = ["--tasks", "local_choice", "--include_path", str(questions)]
    main(["lm-eval", str(wmdp_run), *options, "--start", "--debug"])
    content = results(wmdp_run)
    for role, folder in (("start", model_folder), ("final", wmdp_run / "model")):
        held = content["lm_eval"][role]["local_choice"]
        assert held["acc"] == pytest.approx(accuracy(folder, questions))
        assert held["n"] == 10
        assert held["num_fewshot"] == 0
        assert held["version"].startswith("lm_eval ")
        assert not any("," in key for key in held)
        assert math.isfinite(held["acc_stderr"])
    assert {key: content[key] for key in before} == before
    assert "| wmdp | unlearned |" in capsys.readouterr().out


def test_accuracy_of_an_adapter(questions: Path, model_folder: Path, tmp_path: Path):
    """Exported alone, it is measured on its base."""
    model = load_causal_lm(str(model_folder))
    add_adapter(model, LoraOptions(rank=4))
    for weight in model.parameters():
        weight.data += weight.requires_grad
    save_model(model, load_tokenizer(str(model_folder)), tmp_path / "adapter", merge=False)
    words = ["RUN", "--tasks", "local_choice", "--include_path", str(questions), "--device", "cpu"]
    folder = str(tmp_path / "adapter")
    found = evaluate(folder, folder, parse("lm-eval", words))["local_choice"]["acc"]
    assert found == pytest.approx(accuracy(tmp_path / "adapter", questions))
    assert found != pytest.approx(accuracy(model_folder, questions))


def test_unknown_task(wmdp_run: Path, questions: Path, monkeypatch: pytest.MonkeyPatch):
    """Looked for in the folder first, then among the harness' own, whose index is slow to build."""
    import lm_eval.tasks

    asked, manager = [], lm_eval.tasks.TaskManager

    def quick(include_path: str, include_defaults: bool) -> Any:
        asked.append(include_defaults)
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    tasks = ["--tasks", "no_such_task,local_choice", "--include_path", str(questions)]
    with pytest.raises(UserError, match=r"knows no task no_such_task; .* --include_path FOLDER adds your own"):
        main(["lm-eval", str(wmdp_run), *tasks, "--debug"])
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "--batch_size: must be at least 1, got 0"),
        (["--num_fewshot", "-1"], "--num_fewshot: must be at least 0, got -1"),
        (["--include_path", "/no/such"], "--include_path: /no/such is not a folder"),
    ],
)
def test_options(tmp_path: Path, options: list[str], message: str):
    with pytest.raises(UserError, match=message):
        main(["lm-eval", str(tmp_path), "--tasks", "x", *options, "--debug"])


def test_harness_is_missing(wmdp_run: Path, monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"this needs lm-evaluation-harness .*simnpo_pl\[lm-eval\]"):
        main(["lm-eval", str(wmdp_run), "--tasks", "x", "--debug"])


def test_shipped_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The demo's forget authors on one side, others on the other; every right answer is at its place."""
    from simnpo_pl.benchmarks.demo import write_dataset

    examples = ROOT / "examples"
    write_dataset(tmp_path, 0)
    forget = [json.loads(line) for line in (tmp_path / "forget10.json").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (examples / "wmdp" / "forget.jsonl").read_text().splitlines()]
    assert texts == json.loads((examples / "muse" / "raw" / "forget.json").read_text())
    assert all(any(row["answer"] in text for text in texts) for row in forget)
    assert not any(text in (examples / "wmdp" / "retain.txt").read_text() for text in texts)
    monkeypatch.chdir(ROOT)
    asked = {}
    for name in ("wmdp_bio", "mmlu"):
        task = yaml.safe_load((examples / "wmdp" / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name
        rows = [
            json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        ]
        asked[name] = {row["question"]: row["choices"][row["answer"]] for row in rows}
        assert all(len(set(row["choices"])) == 4 for row in rows)
    assert asked["wmdp_bio"] == {row["question"]: row["answer"] for row in forget}
    assert not asked["wmdp_bio"].keys() & asked["mmlu"].keys()
