"""The check of what comes back: how attacks are judged, the command on runs and other models, the page's commands."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from helpers import results
from simnpo_pl.__main__ import main
from simnpo_pl.report.robustness import OTHERS, SHOWN, judge, outcome
from simnpo_pl.runs.progress import ProgressBar
from simnpo_pl.runs.record import Run
from simnpo_pl.runs.verdict import headline
from simnpo_pl.studies import parse
from simnpo_pl.studies.check import ATTACKS
from simnpo_pl.studies.relearn import rate_of
from simnpo_pl.studies.reopen import finished_runs, reopen

PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"


@pytest.fixture(scope="module")
def run(run_options: list[str], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unlearned"
    options = ["--run_dir", str(folder), "--eval.retrained", str(other_folder), "--trainer.max_epochs", "1"]
    main(["fit", *run_options, *options])
    return folder


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        # A quarter of the way from 0.1 to 0.9 is 0.3.
        ((0.1, 0.31, None, 0.9), "comes back"),
        ((0.1, 0.29, None, 0.9), "holds"),
        ((0.1, 0.29, None, 0.9, False), "inconclusive"),
        ((0.1, 0.31, None, 0.9, False), "comes back"),
        # From the control's 0.3 it is 0.45.
        ((0.1, 0.44, 0.3, 0.9), "holds"),
        ((0.1, 0.46, 0.3, 0.9), "comes back"),
        # Hardly anything was forgotten, or the start model is not known.
        ((0.81, 0.9, None, 0.9), "inconclusive"),
        ((0.1, 0.9, 0.85, 0.9), "inconclusive"),
        ((0.1, 0.9, None, None), "inconclusive"),
    ],
)
def test_outcomes_by_hand(numbers: tuple[Any, ...], expected: str):
    assert outcome(*numbers) == expected


def curve(relearned: list[float | None], others: list[float]) -> list[dict[str, Any]]:
    return [
        {"epoch": i, "step": 4 * i, "metrics": {OTHERS: other} | ({} if own is None else {SHOWN: own})}
        for i, (own, other) in enumerate(zip(relearned, others, strict=True))
    ]


def relearned(subset: str, lr: float, epochs: Any, control: Any) -> dict[str, Any]:
    repeat = {"seed": 0, "rows": [1, 4], "epochs": epochs, "control": control}
    return {"settings": {"subset": subset, "share": 0.2, "epochs": 2, "lr": lr}, "repeats": [repeat]}


def record(**attacks: Any) -> dict[str, Any]:
    probability = {"start": 0.9, "final": 0.1, "retrained": 0.2}
    return {name: {"metrics": {"forget/probability": value}} for name, value in probability.items()} | attacks


def test_relearning_is_told_at_its_peak():
    """The weak rate learned a tenth of its own rows, the strong one most; the peak is in its first epoch."""
    control = curve([0.2, 0.6, 0.8], [0.2, 0.25, 0.22])
    weak = relearned("random", 1e-5, curve([0.1, 0.15, 0.18], [0.1, 0.1, 0.11]), control)
    judge(record(relearn={"weak": weak}))
    assert weak["outcome"] == "inconclusive"
    assert weak["sentence"] == (
        "relearning 2 random rows (lr 1e-05, 8 steps): probability of the other forget answers 0.1 -> 0.11, of the "
        "retrained model 0.2 -> 0.25; of those relearned 0.18; too weak, its own rows were not learned: inconclusive"
    )
    # Base 0.25, top 0.9: 0.43 is above the limit 0.25 + 0.65 / 4 = 0.4125.
    strong = relearned("random", 1e-3, curve([0.1, 0.8, 0.9], [0.1, 0.43, 0.3]), control)
    other = relearned("retain", 1e-3, curve([None] * 3, [0.1, 0.15, 0.2]), curve([None] * 3, [0.2, 0.2, 0.2]))
    judge(record(relearn={"weak": weak, "strong": strong, "retain": other}))
    assert (weak["outcome"], strong["outcome"], strong["sentence"]) == ("comes back", "comes back", "")
    assert (
        "(lr 0.001, 8 steps, highest after 4): probability of the other forget answers 0.1 -> 0.43, of"
        in weak["sentence"]
    )
    assert other["sentence"] == (
        "relearning 2 retain rows (lr 0.001, 8 steps): probability of the forget answers 0.1 -> 0.2, of the retrained "
        "model 0.2 -> 0.2: holds"
    )
    # Rows are repeated where there are too few; the sentence counts different ones.
    other["repeats"][0]["rows"] = [1, 1, 4]
    judge(record(relearn={"strong": strong, "retain": other}))
    assert other["sentence"].startswith("relearning 2 retain rows (lr 0.001, 8 steps): ")
    # Without a control the sentence says what is not known.
    del strong["repeats"][0]["control"]
    judge(record(relearn={"strong": strong}))
    assert strong["sentence"].endswith(
        "0.1 -> 0.43; of those relearned 0.9: comes back; no control: a model that never saw the rows may reach this, "
        "too; give --retrained MODEL"
    )
    # Without an attack on forget rows nobody knows whether this one was strong enough.
    judge(record(relearn={"retain": other}))
    assert other["outcome"] == "inconclusive"
    # Versions before 0.2 did not measure the other rows.
    old = {"settings": weak["settings"], "repeats": [{"seed": 0, "rows": [1], "epochs": [{"epoch": 0, "metrics": {}}]}]}
    judge(record(relearn={"old": old}))
    assert "outcome" not in old


def test_the_control_is_that_of_the_attack_at_its_peak():
    """Attacked at a weaker rate alone it is none: 0.6 of a possible 0.9 came back, at a rate it was not trained at."""
    weak = relearned("random", 1e-5, curve([0.1, 0.15, 0.2], [0.1, 0.11, 0.12]), curve([0.2] * 3, [0.2, 0.2, 0.22]))
    strong = relearned("random", 1e-3, curve([0.1, 0.8, 0.9], [0.1, 0.5, 0.6]), curve([0.2] * 3, [0.2, 0.5, 0.7]))
    judge(record(relearn={"weak": weak, "strong": strong}))
    assert weak["sentence"].endswith("0.1 -> 0.6, of the retrained model 0.2 -> 0.7; of those relearned 0.9: holds")
    # A control that goes higher at a weaker rate does not excuse the peak.
    weak["repeats"][0]["control"], strong["repeats"][0]["control"] = (
        one["repeats"][0]["control"] for one in (strong, weak)
    )
    judge(record(relearn={"weak": weak, "strong": strong}))
    assert "0.1 -> 0.6, of the retrained model 0.2 -> 0.22; of those relearned 0.9: comes back" in (weak["sentence"])
    del strong["repeats"][0]["control"]
    judge(record(relearn={"weak": weak, "strong": strong}))
    assert "0.1 -> 0.6; of those relearned 0.9: comes back; no control: " in weak["sentence"]


def test_texts_of_one_name_are_judged_apart():
    flat = curve([None] * 3, [0.2] * 3)
    attacks = {"random": relearned("random", 1e-3, curve([0.1, 0.8, 0.9], [0.1] * 3), flat)}
    for path, others in (("wiki/text.txt", [0.1] * 3), ("forum/text.txt", [0.1, 0.5, 0.7])):
        attacks[path] = relearned("text", 1e-3, curve([None] * 3, others), flat)
        attacks[path]["settings"]["text"] = path
    judge(record(relearn=attacks))
    assert [attacks[f"{name}/text.txt"]["outcome"] for name in ("wiki", "forum")] == ["holds", "comes back"]
    assert attacks["wiki/text.txt"]["sentence"].startswith("relearning 2 wiki/text.txt rows (lr 0.001, 8 steps): ")


def test_rounding_and_sampling_are_told():
    """Of 20 rows 9 answer right, 4 of the retrained model's: (0.45 - 0.2) / 0.8 = 0.3125."""
    rounded = {name: {"metrics": {"forget/probability": value}} for name, value in (("8-bit", 0.1), ("nf4", 0.3))}
    prompts = {kind: {"leak@4": value} for kind, value in (("question", 0.3), ("examples", 0.4), ("any", 0.45))}
    sample = {"settings": {"k": 4}, "n": 20, "prompts": prompts, "control": {"any": {"leak@4": 0.2}}}
    found = record(quantized=rounded, leak={"k=4": sample, "old": {"metrics": {"leak@1": 1.0}}})
    judge(found)
    assert rounded["8-bit"]["sentence"] == (
        "rounded weights (8-bit, nf4): forget probability 0.1 -> at most 0.3 (nf4), retrained model 0.2: holds"
    )
    assert sample["sentence"] == (
        "sampled answers: one of 4 to each of question and examples is right for 9 of 20 rows, of the retrained model "
        "for 4: comes back"
    )
    assert "outcome" not in found["leak"]["old"]


def test_rounding_that_leaves_nothing_is_a_measurement():
    gone = {"metrics": {"forget/probability": 0.0}}
    judge(record(quantized={"8-bit": gone}))
    assert gone["sentence"] == (
        "rounded weights (8-bit): forget probability 0.1 -> at most 0 (8-bit), retrained model 0.2: holds"
    )


def test_the_rate_of_a_model_that_was_only_evaluated(tmp_path: Path):
    """`--model.lr auto` finds a rate in `fit` alone."""
    for given, expected in (("auto", 1e-5), (3e-4, 3e-4)):
        assert rate_of(Run("", tmp_path, {"settings": {"model": {"lr": given}}})) == expected


def test_an_attack_has_the_bar_of_fit(run: Path):
    """One bar, not Lightning's, or none."""
    (finished,) = finished_runs([run])
    for given, expected in (("true", [ProgressBar]), ("false", [])):
        callbacks = reopen(finished, "--trainer.enable_progress_bar", given).trainer.callbacks
        assert [type(one) for one in callbacks if isinstance(one, AnyProgressBar)] == expected


def test_an_attack_clips_gradients_as_the_run(run: Path):
    (finished,) = finished_runs([run])
    trainer = reopen(
        finished, "--trainer.gradient_clip_algorithm", "value", "--trainer.gradient_clip_val", "0.1"
    ).trainer
    assert (trainer.gradient_clip_algorithm, trainer.gradient_clip_val) == ("value", 0.1)


def test_a_run_is_checked(run: Path, capsys: pytest.CaptureFixture[str]):
    """All attacks, with the control, at rates up to ten times the run's own; sentences and verdict are kept."""
    main(["check", str(run), "--epochs", "2", "--k", "2", "--debug"])
    found = results(run)
    rates = {attack["settings"]["lr"] for attack in found["relearn"].values()}
    assert rates <= {0.01, 0.03, 0.1}
    assert 0.01 in rates
    assert {attack["settings"]["subset"] for attack in found["relearn"].values()} == {"random", "retain"}
    assert all(repeat["control"] for attack in found["relearn"].values() for repeat in attack["repeats"])
    assert {"8-bit", "4-bit group=32"} <= set(found["quantized"])
    (sample,) = found["leak"].values()
    assert set(sample["prompts"]) == {"question", "examples", "any"}
    groups = [list(found[name].values()) for name in ("relearn", "quantized", "leak")]
    told = [attack["sentence"] for group in groups for attack in group if attack["sentence"]]
    assert len(told) == 4
    told.append(found["depth"]["sentence"])
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("* ")] == [
        *(f"* {sentence}" for sentence in told),
        f"* verdict: {headline(found)}",
        *(f"* advice: {line}" for line in found["verdict"]["advice"]),
    ]
    assert found["verdict"]["advice"]
    assert set(told) <= set(found["verdict"]["reasons"])
    names = {"relearn": "relearning", "quantized": "rounded weights", "leak": "sampled answers"}
    for group, words in names.items():
        # An attack that was too weak has tested nothing.
        weak = all(attack["outcome"] == "inconclusive" for attack in found[group].values())
        assert (words in found["verdict"]["untested"]) == weak
    # With all there nothing is attacked again.
    main(["check", str(run), "--epochs", "2", "--k", "2"])
    assert results(run) == found


def test_another_model_is_evaluated_and_checked(
    run_options: list[str], model_folder: Path, other_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The model itself is attacked, from what its evaluation measured; it has no verdict."""
    place, model = run_options.index("--model.name"), shutil.copytree(model_folder, tmp_path / "model")
    options = [*run_options[:place], *run_options[place + 2 :], "--eval.retrained", str(other_folder)]
    command = ["check", str(model), *options, "--out", str(tmp_path / "checks"), "--epochs", "1"]
    main([*command, "--attacks", "relearn", "--debug"])
    (folder,) = (path for path in (tmp_path / "checks").iterdir() if (path / "results.json").is_file())
    found = results(folder)
    assert not {"objective", "verdict"} & found.keys()
    curves = [repeat["epochs"] for attack in found["relearn"].values() for repeat in attack["repeats"]]
    before = found["final"]["metrics"]["forget/probability"]
    assert all(epochs[0]["metrics"]["forget/probability"] == pytest.approx(before, rel=1e-5) for epochs in curves)
    with pytest.raises(SystemExit):
        main([*command, "--data.forget_split", "forget05"])
    assert "holds a run that was started with other options" in capsys.readouterr().err
    # What was measured on other weights is not this model's.
    shutil.copy(other_folder / "model.safetensors", model)
    with pytest.raises(SystemExit):
        main([*command, "--attacks", "relearn"])
    assert f"{folder} holds a run that was started with other model files" in capsys.readouterr().err


def test_another_control(run: Path, other_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One that is not there is missed before the first attack; the Unlearning Depth Score is measured again."""
    gone, copy, before = tmp_path / "gone", tmp_path / "copy", (run / "results.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["check", str(run), "--attacks", "relearn", "leak", "--k", "3", "--retrained", str(gone)])
    assert stop.value.code == 2
    assert f"error: --retrained: folder {gone} does not exist" in capsys.readouterr().err
    assert (run / "results.json").read_bytes() == before
    for model in (other_folder, shutil.copytree(other_folder, copy)):
        main(["check", str(run), "--attacks", "depth", "--retrained", str(model)])
        assert results(run)["depth"]["settings"]["retrained"] == str(model)
    main(["check", str(run), "--attacks", "relearn", "--epochs", "1", "--text", str(gone)])
    shown = capsys.readouterr().out
    assert f"not tested: relearning with {gone} (--text" in shown
    assert "* relearning 2 random rows (" in shown


def test_mistakes(run: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]):
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 2
        return capsys.readouterr().err

    for command in ("check", "relearn", "quantize", "leak"):
        found = said(command, str(run), "--shaer", "0.2")
        assert "unrecognized arguments: --shaer 0.2; only a model is evaluated with a config, no run" in found
        found = said(command, str(model_folder))
        assert f"{model_folder} holds no results.json; give folders that fit or test wrote, or, for another" in found
    assert "--attacks: invalid choice: 'steal'" in said("check", str(run), "--attacks", "steal")
    table = run.parent / "table.jsonl"
    table.write_text('{"words": "Rivers flow."}\n')
    found = said("relearn", str(run), "--subset", "retain", "--epochs", "1", "--repeats", "1", "--text", str(table))
    assert f"--text {table} row 0, counted from 0, has no column 'text'; its columns are: words" in found


def test_a_run_with_named_columns_and_made_retain_rows(
    data_folder: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The made rows have the default names; forget rows that were moved are named again, as other devices are."""
    rows = [json.loads(line) for line in (data_folder / "forget10.json").read_text().splitlines()]
    forget, run = tmp_path / "forget.jsonl", tmp_path / "run"
    named = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    forget.write_text("".join(json.dumps(row) + "\n" for row in named))
    options = ["--config", str(PAGE.parents[1] / "configs" / "own.yaml"), "--model.name", str(model_folder)]
    options += ["--data.forget", str(forget), "--data.columns.question", "prompt", "--data.columns.answer"]
    options += ["completion", "--model.lr", "1e-2", "--eval.max_new_tokens", "5", "--trainer.max_epochs", "1"]
    main(["fit", *options, "--run_dir", str(run), "--trainer.accelerator", "cpu"])
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("accelerator: cpu", "accelerator: cuda"))
    moved = forget.rename(tmp_path / "moved.jsonl")
    command = ["relearn", str(run), "--subset", "retain", "--epochs", "1", "--repeats", "1"]
    with pytest.raises(SystemExit):
        main(command)
    capsys.readouterr()
    main([*command, "--data.forget", str(moved), "--trainer.accelerator", "cpu", "--debug"])
    (attack,) = results(run)["relearn"].values()
    assert attack["settings"]["subset"] == "retain"


def test_every_attack_can_be_chosen():
    for name in ATTACKS:
        assert parse("check", ["run", "--attacks", name]).attacks == [name]


def test_what_cannot_be_attacked_is_said(run_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Text has no answers to sample and, here, nothing to retain; the other attacks are made."""
    text = tmp_path / "forget.jsonl"
    words = [f"The river {name} flows through a green valley to the sea." for name in "abcdefghij"]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in words))
    config = Path(__file__).parents[1] / "configs" / "own.yaml"
    model = run_options[run_options.index("--model.name") + 1]
    options = ["--config", str(config), "--data.forget", str(text), "--data.retain", "null", "--data.rows", "documents"]
    options += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--out", str(tmp_path)]
    main(["check", model, *options, "--epochs", "1", "--k", "2", "--debug"])
    shown = capsys.readouterr().out
    assert "not tested: relearning with retain rows (" in shown
    assert "not tested: sampled answers (" in shown
    assert "* relearning 2 random rows (" in shown


@pytest.fixture(scope="module")
def places(
    run: Path, model_folder: Path, other_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What stands for the names that the page uses."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(run, folder / "npo")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    labels = {"id2label": {0: "no", 1: "entailment"}, "label2id": {"no": 0, "entailment": 1}}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **labels)).save_pretrained(
        folder / "c"
    )
    tokenizer.save_pretrained(folder / "c")
    (folder / "text.txt").write_text("Rivers flow down to the sea. " * 40)
    names = {
        "runs/simnpo": run,
        "runs/demo": run,
        "runs/npo": folder / "npo",
        "MODEL": model_folder,
        "RETRAINED": other_folder,
    }
    names |= {"CLASSIFIER": folder / "c", "text.txt": folder / "text.txt"}
    names |= {name: folder / name for name in ("report.html", "robustness.md")}
    return {name: str(path) for name, path in names.items()}


COMMANDS = [
    line.removeprefix("python -m simnpo_pl ")
    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()
    if " fit " not in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(command: str, places: dict[str, str], run_options: list[str], tmp_path: Path):
    """As they are written, on small models and rows."""
    words = [places.get(word, word) for word in shlex.split(command)]
    small = {"relearn": ["--epochs", "1", "--repeats", "1"], "check": ["--epochs", "1"], "leak": ["--k", "2"]}
    if "--config" in words:
        place = run_options.index("--model.name")
        words += [*run_options[2:place], *run_options[place + 2 :], "--out", str(tmp_path)]
    main([*words, *small.get(words[0], []), "--debug"])
