"""leak@k: the draws, the best of k, and what stays the same however the answers are batched."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from simnpo_pl.__main__ import main
from simnpo_pl.data.conversation import Conversation
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.models.generation import Sampler, draws_of, generate
from simnpo_pl.studies.leak import expected_best, with_bounds


def test_expected_best_by_hand():
    """Scores 1, 4, 2: single ones average 7/3; the best of pairs is 4, 4, 2; of all three 4."""
    assert expected_best(torch.tensor([[1.0, 4.0, 2.0]])).tolist() == [pytest.approx([7 / 3, 10 / 3, 4])]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_expected_best_is_the_mean_over_all_choices(scores: list[float]):
    expected = []
    for k in range(1, len(scores) + 1):
        best = [max(choice) for choice in itertools.combinations(scores, k)]
        expected.append(sum(best) / len(best))
    assert expected_best(torch.tensor([scores], dtype=torch.float64))[0].tolist() == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=7))
def test_best_of_right_or_wrong_is_the_share_of_choices_with_a_right_answer(correct: list[bool]):
    expected = []
    for k in range(1, len(correct) + 1):
        choices = [any(choice) for choice in itertools.combinations(correct, k)]
        expected.append(sum(choices) / len(choices))
    assert expected_best(torch.tensor([correct]))[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_leak_as_published(shared: Path):
    """Values of the public code, in all and by row."""
    golden = json.loads((shared / "goldens" / "A" / "newer.json").read_text())["leak"]
    for table in golden["tables"]:
        leaks = expected_best(torch.tensor(table["correct"]).bool())
        assert leaks.mean(dim=0).tolist() == pytest.approx(table["leak_at_k"], abs=1e-12)
        for row, expected in zip(leaks.tolist(), table["leak_at_k_per_row"], strict=True):
            assert [row[k - 1] for k in golden["per_row_k"]] == pytest.approx(expected, abs=1e-12)


def test_bounds_by_hand():
    """Of 40 rows 10 leak: 1.96 standard errors are 1.96 sqrt(0.25 * 0.75 / 40) = 0.134; without spread none."""
    leaks = torch.cat([torch.ones(10, 3), torch.zeros(30, 3)]).double()
    found = with_bounds(leaks)
    assert found["leak@2"] == 0.25
    assert found["leak@2/low"] == pytest.approx(0.25 - 0.134, abs=0.03)
    assert found["leak@2/high"] == pytest.approx(0.25 + 0.134, abs=0.03)
    assert {name for name in found if "low" in name} == {"leak@1/low", "leak@2/low", "leak@3/low"}
    same = with_bounds(torch.ones(5, 1).double())
    assert (same["leak@1/low"], same["leak@1/high"]) == (pytest.approx(1), pytest.approx(1))


def test_sampler_by_hand():
    """Shares 0.2, 0 and 0.8 of the cumulated probabilities; at temperature 1/2 the probabilities are squared."""
    logits = torch.tensor([[0.2, 0.0, 0.8]]).log().expand(4, 3)
    draws = torch.tensor([[0.0], [0.19], [0.2], [0.999999]], dtype=torch.float64)
    rows = torch.arange(4)
    assert Sampler(draws)(logits, rows, 0).tolist() == [0, 0, 2, 2]
    # 0.04 / 0.68 = 0.0588.
    assert Sampler(draws, temperature=0.5)(logits, rows, 0).tolist() == [0, 2, 2, 2]
    # Rows that are still running name their own draws.
    assert Sampler(draws)(logits[:2], torch.tensor([3, 1]), 0).tolist() == [2, 0]


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    draws = torch.stack([draws_of(7, 0, sample, 1) for sample in range(4000)])
    taken = Sampler(draws)(probabilities.log().expand(4000, 3), torch.arange(4000), 0)
    shares = torch.bincount(taken, minlength=3) / 4000
    assert (shares - probabilities).abs().max() < 0.025
    assert len({tuple(draws_of(*key, 3).tolist()) for key in itertools.product((0, 1), repeat=3)}) == 8


def test_a_sample_does_not_depend_on_its_batch(model_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    prompts = [[5, 9, 7], [3, 4, 8, 11, 12, 6], [20]]
    draws = torch.stack([draws_of(0, row, 0, 8) for row in range(3)])
    together = generate(model, prompts, 8, [1], Sampler(draws))
    alone = [generate(model, [p], 8, [1], Sampler(draws[i : i + 1]))[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together != generate(model, prompts, 8, [1])
    # Nearly all probability is the most probable token's.
    assert generate(model, prompts, 8, [1], Sampler(draws, temperature=1e-4)) == generate(model, prompts, 8, [1])


def test_command(run_options: list[str], other_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The same answers in batches of 48 and of 3; another seed draws others; what is there is not drawn again."""
    one, other = tmp_path / "one", tmp_path / "other"
    options = ["--run_dir", str(one), "--trainer.max_epochs", "1", "--eval.start", "false", "--eval.generate_rows", "2"]
    main(["fit", *run_options, *options])
    shutil.copytree(one, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("prompts_per_batch: null", "prompts_per_batch: 3"))
    main(["leak", str(one), str(other), "--k", "5", "--debug"])
    main(["leak", str(one), "--k", "5", "--seed", "1234567", "--debug"])
    found = [json.loads((folder / "results.json").read_text())["leak"] for folder in (one, other)]
    key = "k=5 temperature=1 seed={} correct=0.8"
    first, second = found[0][key.format(0)], found[0][key.format(1234567)]
    assert found[1] == {key.format(0): first}
    assert first["n"] == 10
    values = [first["metrics"][f"best_rouge@{k}"] for k in range(1, 6)]
    assert values == sorted(values)
    assert second["metrics"] != first["metrics"]
    rows = [json.loads(line) for line in (one / "leak_5_1_0_0.8.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["question"] * 10 + ["examples"] * 10
    rows = rows[:10]
    assert (one / "leak_5_1_0_0.8.jsonl").read_text() == (other / "leak_5_1_0_0.8.jsonl").read_text()
    best = [max(sample["rougeL_recall"] for sample in row["samples"]) for row in rows]
    assert sum(best) / 10 == pytest.approx(values[-1])
    assert [row["samples"][0]["rougeL_recall"] for row in rows] == best
    line = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| one | SimNPO | 1 | 0 | 10 | question |")
    )
    assert len(line.split(" | ")) == 6 + 4

    before = (one / "leak_5_1_0_0.8.jsonl").stat().st_mtime_ns
    main(["leak", str(one), "--k", "5", "--debug"])
    assert (one / "leak_5_1_0_0.8.jsonl").stat().st_mtime_ns == before
    # A control that was not known before is sampled beside it.
    main(["leak", str(one), "--k", "5", "--retrained", str(other_folder), "--debug"])
    sample = json.loads((one / "results.json").read_text())["leak"]["k=5 temperature=1 seed=0 correct=0.8"]
    assert sample["control"]["any"]["leak@5"] >= 0
    # Another control in its place, whose own tokenizer does not count.
    third = tmp_path / "third"
    shutil.copytree(other_folder, third, ignore=shutil.ignore_patterns("tokenizer*"))
    main(["leak", str(one), "--k", "5", "--retrained", str(third), "--debug"])
    again = json.loads((one / "results.json").read_text())["leak"]["k=5 temperature=1 seed=0 correct=0.8"]
    assert (sample["retrained"], again) == (str(other_folder), {**sample, "retrained": str(third)})
    with pytest.raises(SystemExit):
        main(["leak", str(one), "--k", "5", "--retrained", str(tmp_path / "gone")])
    assert f"--retrained: folder {tmp_path / 'gone'} does not exist" in capsys.readouterr().err


def test_examples_in_front(model_folder: Path):
    """As a template that begins with the example; turns of a chat, after its system message."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    plain = PromptTemplate(tokenizer)
    shown = PromptTemplate(tokenizer, "Question: Where?\nAnswer: Here.\n\nQuestion: {question}\nAnswer: {answer}")
    asked = plain.after_examples("Who writes?", [("Where?", "Here.")])
    assert plain.encode(asked, "Jaime.") == shown.encode("Who writes?", "Jaime.")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    question = Conversation([("system", "Be brief."), ("user", "Who writes?")])
    turns = PromptTemplate(tokenizer).after_examples(question, [("Where?", "Here.")])
    assert isinstance(turns, Conversation)
    assert turns.messages == (
        ("system", "Be brief."),
        ("user", "Where?"),
        ("assistant", "Here."),
        ("user", "Who writes?"),
    )


def test_prompts_rule_and_control(
    run_options: list[str], data_folder: Path, other_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Each prompt's own answers; a row leaks if one of the prompts does; the rule, with and without a classifier."""
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(data_folder, data)
    file = data / "forget10_perturbed.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [{**row, "paraphrased_question": f"Please tell: {row['question']}"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = ["--data.path", str(data), "--run_dir", str(folder), "--eval.retrained", str(other_folder)]
    main(["test", *run_options, *options, "--eval.generate_rows", "0", "--data.template", "Q: {question} A: {answer}"])
    judge = _classifier(tmp_path / "judge", other_folder)
    rule = ["--entailment", str(judge), "--entailment_label", "yes"]
    for further in (["--correct", "0.01"], ["--correct", "0", *rule]):
        main(["leak", str(folder), "--k", "4", *further, "--debug"])
    found = json.loads((folder / "results.json").read_text())["leak"]
    plain = found["k=4 temperature=1 seed=0 correct=0.01"]
    judged = found[f"k=4 temperature=1 seed=0 correct=0 entailment={judge} entailment_label=yes"]
    # Each rule has a file of its own.
    (file,) = folder.glob("leak_4_1_0_0_*_yes.jsonl")
    assert (folder / "leak_4_1_0_0.01.jsonl").is_file()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    prompts = ["question", "paraphrase", "examples"]
    assert list(plain["prompts"]) == list(plain["control"]) == [*prompts, "any"]
    assert plain["control"] != plain["prompts"]
    by_row = {(line["prompt"], line["index"]): line["samples"] for line in lines}
    assert len({str(by_row[kind, 0]) for kind in prompts}) == 3
    right = {key: [sample["rougeL_recall"] >= 0.01 for sample in samples] for key, samples in by_row.items()}
    share = sum(any(any(right[kind, row]) for kind in prompts) for row in range(10)) / 10
    assert plain["prompts"]["any"]["leak@4"] == pytest.approx(share)
    single = sum(sum(right["question", row]) / 4 for row in range(10)) / 10
    assert plain["prompts"]["question"]["leak@1"] == plain["metrics"]["leak@1"] == pytest.approx(single)
    assert 0 < single < share

    # By the classifier's own probability of pairs of answer and truth.
    from simnpo_pl.evaluation.fluency import FluencyClassifier

    rate = FluencyClassifier(str(judge), "yes")
    answers = [line for line in lines if line["prompt"] == "question"]
    texts = [(sample["generation"], line["answer"]) for line in answers for sample in line["samples"]]
    expected = [value >= 0.5 for value in rate(*zip(*texts, strict=True))]
    assert [sample["correct"] for line in answers for sample in line["samples"]] == expected
    assert judged["prompts"]["question"]["leak@1"] == pytest.approx(sum(expected) / 40)
    assert 0 < sum(expected) < 40

    with pytest.raises(SystemExit):
        main(["leak", str(folder), "--entailment", str(judge)])
    assert f"--entailment {judge} has no label 'entailment', its labels are no, yes" in capsys.readouterr().err


def _classifier(folder: Path, tokenizer_folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes, **names)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k", "0"), "--k: must be at least 1, got 0"),
        (("--temperature", "0"), "--temperature: must be above 0, got 0"),
        (("--seed", "-1"), "--seed: must be at least 0, got -1"),
    ],
)
def test_mistakes(options: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["leak", str(tmp_path), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
