"""Whole runs through the command line: what they leave, what they refuse, resuming, two processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import killed_in_epoch, losses, results, same_weights
from simnpo_pl.metrics.logs import read_retain_log
from simnpo_pl.metrics.membership import ATTACKS
from simnpo_pl.utils.errors import UserError

CLI = Callable[..., None]
METRICS = {
    *("forget/probability", "forget/rouge", "forget/truth_ratio", "forget/extraction_strength"),
    *("forget/exact_memorization", "model_utility"),
    *(f"{s}/{m}" for s in ("retain", "real_authors", "world_facts") for m in ("probability", "rouge", "truth_ratio")),
}


@pytest.fixture(scope="module")
def finished(run_options: list[str], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run with a retrained model."""
    from simnpo_pl.__main__ import main

    folder = tmp_path_factory.mktemp("runs") / "finished"
    main(["fit", *run_options, "--run_dir", str(folder), "--eval.retrained", str(other_folder), "--debug"])
    return folder


def test_files_of_a_run(finished: Path):
    assert {f.name for f in finished.iterdir() if not f.name.startswith("events.")} >= {
        *("config.yaml", "results.json", "rows.jsonl", "TOFU_EVAL.json", "last.ckpt", "model"),
        *("start_rows.jsonl", "retrained_rows.jsonl", "history.jsonl"),
    }
    assert not [f for f in finished.iterdir() if f.name.startswith(".")]
    assert any(f.name.startswith("events.") for f in finished.iterdir())


def test_results(finished: Path):
    """Every metric before, after every epoch and at the end; with counts, versions, seed, time and memory."""
    content = results(finished)
    assert content["finished"] is True
    assert [e["epoch"] for e in content["epochs"]] == [1, 2]
    assert content["epochs"][1]["step"] == 6
    for entry in (content["start"], content["final"], *content["epochs"]):
        assert set(entry["metrics"]) >= METRICS | {"forget_quality", "forget_quality/ks_statistic"}
        assert all(math.isfinite(v) for v in entry["metrics"].values())
    assert content["final"]["metrics"] == content["epochs"][-1]["metrics"]
    assert set(content["retrained"]["metrics"]) >= METRICS
    assert content["counts"]["forget/probability"] == 10
    assert content["counts"]["retain/truth_ratio"] == 7
    assert content["counts"]["forget_quality"] == 10
    assert set(content["unavailable"]) == {*ATTACKS, "privleak", "forget/fluency"}
    assert content["versions"]["torch"] == torch.__version__
    assert content["seed"] == 0
    assert content["seconds"]["total"] > 0
    assert content["peak_memory_gib"]["process"] > 0


def test_rows(finished: Path):
    """Per-row scores agree with the aggregates; texts are there for every row."""
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert [sum(r["split"] == s for r in rows) for s in ("forget", "retain", "real_authors", "world_facts")] == [
        *(10, 7, 5, 3)
    ]
    forget = [r for r in rows if r["split"] == "forget"]
    final = results(finished)["final"]["metrics"]
    probability = sum(math.exp(-r["answer_nll"]) for r in forget) / 10
    assert probability == pytest.approx(final["forget/probability"], rel=1e-5)
    ratio = [math.exp(r["paraphrase_nll"] - sum(r["perturbed_nll"]) / 5) for r in forget]
    assert [r["truth_ratio"] for r in forget] == pytest.approx(ratio, rel=1e-5)
    assert sum(min(x, 1 / x) for x in ratio) / 10 == pytest.approx(final["forget/truth_ratio"], rel=1e-5)
    assert all(isinstance(r["generation"], str) and "rougeL_recall" in r for r in rows)


def test_rows_of_the_models_it_is_compared_with(finished: Path):
    for name in ("start", "retrained"):
        rows = [json.loads(line) for line in (finished / f"{name}_rows.jsonl").read_text().splitlines()]
        forget = [math.exp(-row["answer_nll"]) for row in rows if row["split"] == "forget"]
        measured = results(finished)[name]["metrics"]["forget/probability"]
        assert sum(forget) / 10 == pytest.approx(measured, rel=1e-5)
        assert all(isinstance(row["generation"], str) for row in rows)


def test_history_and_objective(finished: Path):
    """A line a step; the learning rate is the step's own, in a warm-up of three steps."""
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in history] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert all(math.isfinite(line[key]) for line in history for key in ("loss", "forget_loss", "retain_loss"))
    weighted = [0.25 * line["forget_loss"] + line["retain_loss"] for line in history]
    assert [line["loss"] for line in history] == pytest.approx(weighted, rel=1e-5)
    assert [line["lr"] for line in history[:3]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert results(finished)["objective"] == {
        "name": "SimNPO",
        "settings": {"beta": 3.5, "gamma": 3.5},
        "forget_weight": 0.25,
        "retain_loss": "NLL",
        "retain_weight": 1.0,
        "update": None,
    }


def test_exported_model_loads_and_is_the_last_epochs(finished: Path):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    AutoTokenizer.from_pretrained(finished / "model")
    card = ModelCard.load(finished / "model" / "README.md")
    values = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert values["model_utility"] == results(finished)["final"]["metrics"]["model_utility"]
    assert str(finished.parent) not in card.content
    saved = torch.load(finished / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"policy.{k}"], v) for k, v in model.state_dict().items())


def test_tensorboard_events(finished: Path):
    """Scalars in groups, truth-ratio histograms and sample answers by epoch, settings with the outcome."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished), size_guidance={"histograms": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {"train/loss", "train/forget_loss", "train/retain_loss", "forget/quality", "forget/probability"}
    assert scalars >= {"utility/model_utility", "utility/real_authors_rouge", "retain/probability", "lr-AdamW/pg1"}
    groups = {name.split("/")[0] for name in scalars - {"epoch"}}
    assert groups == {"train", "forget", "retain", "utility", "lr-AdamW"}
    assert len(events.Scalars("train/loss")) == 6
    content = results(finished)
    for name, tag in (("forget/probability",) * 2, ("model_utility", "utility/model_utility")):
        # Files of one second are read by name, the tenth before the ninth.
        logged = sorted(events.Scalars(tag), key=lambda event: event.wall_time)
        assert [event.step for event in logged] == [0, 2, 5]
        assert logged[0].value == pytest.approx(content["start"]["metrics"][name], rel=1e-5)
    assert "samples/text_summary" in events.Tags()["tensors"]
    drawn = sorted(events.Histograms("forget/log10_truth_ratio"), key=lambda event: event.wall_time)
    assert [event.step for event in drawn] == [0, 3, 6]
    assert [event.histogram_value.num for event in drawn] == [10, 10, 10]
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    ratios = [math.log10(row["truth_ratio"]) for row in rows if row["split"] == "forget"]
    assert drawn[-1].histogram_value.sum == pytest.approx(sum(ratios), rel=1e-4)


def test_settings_are_logged_with_the_final_metrics(finished: Path):
    """Start, retrained and final model are lines over the whole run, in the charts of the epochs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = results(finished)
    for model in ("start", "retrained", "final"):
        events = EventAccumulator(str(finished / model))
        events.Reload()
        for name, tag in (("forget/probability",) * 2, ("model_utility", "utility/model_utility")):
            line = events.Scalars(tag)
            assert [event.step for event in line] == [0, 6]
            value = content[model]["metrics"][name]
            assert [event.value for event in line] == pytest.approx([value, value], rel=1e-5)
    start = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(start).session_start_info.hparams
    numbers = {"lr": 1e-2, "beta": 3.5, "gamma": 3.5, "forget_weight": 0.25, "retain_weight": 1.0, "seed": 0}
    assert {name: settings[name].number_value for name in numbers} == numbers
    assert settings["objective"].string_value == "SimNPO"


def test_config_of_a_run_repeats_it(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from simnpo_pl.__main__ import main

    again = tmp_path / "again"
    os.environ.pop("SIMNPO_PL_RUN_DIR", None)
    main(["fit", "--config", str(finished / "config.yaml"), "--run_dir", str(again), "--debug"])
    assert results(again)["final"] == results(finished)["final"]
    assert results(again)["epochs"] == results(finished)["epochs"]
    assert same_weights(again, finished)
    out = capsys.readouterr().out
    assert re.search(r"^  metric +start +retrained +unlearned", out, re.MULTILINE)
    assert f"written to {again}:\n" in out


def test_the_name_of_a_run_is_its_own(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A later run of this process, without --run_dir, too, makes another folder."""
    monkeypatch.chdir(tmp_path)
    cli("test", "--eval.generate_rows", "0")
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert "SIMNPO_PL_RUN_DIR" not in os.environ


def test_test_command_repeats_the_final_evaluation(cli: CLI, finished: Path, other_folder: Path, tmp_path: Path):
    """Also with our own log as the retrained model's, which is how results are compared across machines."""
    cli("test", "--model.name", str(other_folder), "--run_dir", str(tmp_path / "retrained"))
    assert "forget_quality" in results(tmp_path / "retrained")["unavailable"]
    for log in ("rows.jsonl", "TOFU_EVAL.json", ""):
        folder = tmp_path / f"check {log}"
        options = ["--model.name", str(finished / "model"), "--eval.retain_log", str(tmp_path / "retrained" / log)]
        cli("test", *options, "--run_dir", str(folder))
        final = results(folder)["final"]["metrics"]
        assert final == pytest.approx(results(finished)["final"]["metrics"], rel=1e-4)
        comparator = results(folder)["comparator"]
        assert Path(comparator["source"]) == tmp_path / "retrained" / (log or "rows.jsonl")
        assert comparator["kind"] == ("open-unlearning" if log == "TOFU_EVAL.json" else "simnpo_pl")
        assert comparator["rows"] == {"forget": 10, "holdout": 0}
        assert comparator["tokens_compared"] == (log != "TOFU_EVAL.json")


def test_comparators_that_cannot_be_compared_are_refused(
    cli_error: Callable[..., str], finished: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    """Another template, another truncation, an unlearned model; of its run, the retrained model's rows are taken."""
    log = str(finished / "retrained_rows.jsonl")
    for options in (
        ("--data.template", "Q: {question} A: {answer}"),
        ("--data.max_length", "32", "--data.truncate", "true"),
    ):
        error = cli_error("test", "--eval.retain_log", log, *options)
        assert "of forget10, made with another prompt template, truncation or tokenizer" in error
    error = cli_error("test", "--eval.retrained", str(finished / "model"))
    assert f"this model was unlearned in {finished}; give one that was trained without the forget rows" in error
    assert results(finished)["comparator"]["kind"] == "evaluated in this run"
    log = read_retain_log(finished)
    assert log.source == str(finished / "retrained_rows.jsonl")
    assert "the rows of the retrained model it was compared with are read" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize("command", ["test", "validate"])
def test_compare_with_a_retrained_model(cli: CLI, finished: Path, other_folder: Path, tmp_path: Path, command: str):
    """The two models' numbers are kept apart, with the retrained one evaluated now or taken from the cache."""
    for number in range(2):
        folder = tmp_path / str(number)
        options = ["--eval.retrained", str(other_folder), "--eval.cache_dir", str(tmp_path / "cache")]
        cli(command, "--model.name", str(finished / "model"), *options, "--run_dir", str(folder))
        content = results(folder)
        assert content["finished"]
        assert content["retrained"]["metrics"] == pytest.approx(results(finished)["retrained"]["metrics"], nan_ok=True)
        assert content["final"]["metrics"] == pytest.approx(results(finished)["final"]["metrics"], rel=1e-4)
        assert (folder / "rows.jsonl").is_file()


def test_limited_evaluation_is_not_kept(cli: CLI, tmp_path: Path):
    options = ["--eval.cache_dir", str(tmp_path / "cache"), "--trainer.max_steps", "1", "--eval.final", "false"]
    cli("fit", *options, "--trainer.limit_val_batches", "1", "--run_dir", str(tmp_path / "limited"))
    cli("fit", *options, "--run_dir", str(tmp_path / "whole"))
    assert set(results(tmp_path / "whole")["start"]["metrics"]) >= METRICS
    start = results(tmp_path / "whole")["start"]["metrics"]
    assert not [name for name, value in start.items() if value is None]


def test_resume_with_other_rows_scores_the_reference_again(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint's reference log-probs serve the same rows and model only."""
    from simnpo_pl.models.reference import Reference

    fills = []
    fill = Reference.fill
    monkeypatch.setattr(Reference, "fill", lambda *a: (fills.append(1), fill(*a))[1])
    npo = ["--model.objective", "NPO", "--eval.start", "false", "--eval.final", "false"]
    cli("fit", *npo, "--run_dir", str(tmp_path / "first"))
    assert len(fills) == 1
    more = ["--ckpt_path", str(tmp_path / "first" / "last.ckpt"), "--trainer.max_epochs", "3"]
    cli("fit", *npo, *more, "--run_dir", str(tmp_path / "same"))
    assert len(fills) == 1
    cli("fit", *npo, *more, "--run_dir", str(tmp_path / "other"), "--data.train_split", "forget10[:6]")
    assert len(fills) == 2


def test_the_schedule_needs_a_number_of_steps(cli_error: Callable[..., str], tmp_path: Path):
    options = ("--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00", "--run_dir", str(tmp_path / "run"))
    assert "max_epochs -1: the schedule needs the number of steps; give --trainer.max_steps" in cli_error(
        "fit", *options
    )
    assert not (tmp_path / "run").exists()


def test_steps_instead_of_epochs(cli: CLI, tmp_path: Path):
    steps = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "4", "--eval.start", "false"]
    cli("fit", *steps, "--run_dir", str(tmp_path / "run"))
    assert results(tmp_path / "run")["finished"]


def test_model_of_nan_is_told(cli: CLI, model_folder: Path, tmp_path: Path):
    """Weights that are not numbers give no numbers, and a warning that names a row."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "nan")
    with pytest.warns(UserWarning, match="the model's loss on forget row 0 is not finite"):
        cli("test", "--model.name", str(tmp_path / "nan"), "--run_dir", str(tmp_path / "run"))
    final = results(tmp_path / "run")["final"]["metrics"]
    assert final["forget/probability"] is final["forget/extraction_strength"] is final["model_utility"] is None
    unavailable = results(tmp_path / "run")["unavailable"]
    assert {unavailable[name] for name, value in final.items() if value is None} == {
        "one of its scores is not a number"
    }


def test_validate_and_predict(cli: CLI, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cli("validate", "--model.name", str(finished / "model"), "--run_dir", str(tmp_path / "v"))
    final = results(tmp_path / "v")["final"]["metrics"]
    assert final["model_utility"] == pytest.approx(results(finished)["final"]["metrics"]["model_utility"], rel=1e-4)
    capsys.readouterr()
    cli("predict", "--model.name", str(finished / "model"), "--run_dir", str(tmp_path / "p"))
    shown = capsys.readouterr().out
    assert "answers are generated for 10 forget rows, 7 retain rows, 5 real_authors rows, 3 world_facts" in shown
    assert "measured" not in shown
    predicted = [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert [p["generation"] for p in predicted] == [r["generation"] for r in rows]
    assert predicted[0].keys() == {"split", "index", "question", "answer", "forget_split", "generation"}


def test_start_evaluation_is_kept_and_depends_on_the_retrained_model(
    cli: CLI, run_options: list[str], other_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A second run takes the start model's batches from the cache; a retrained model is scored besides."""
    from simnpo_pl.module.policy import PolicyModule

    scored = []
    run = PolicyModule._run
    monkeypatch.setattr(PolicyModule, "_run", lambda *a: (scored.append(1), run(*a))[1])
    options = ["--eval.cache_dir", str(tmp_path / "cache"), "--trainer.max_steps", "1", "--eval.final", "false"]
    counts = []
    for number, more in enumerate(([], [], ["--eval.retrained", str(other_folder)])):
        scored.clear()
        cli("fit", *options, *more, "--run_dir", str(tmp_path / str(number)))
        counts.append(len(scored))
    first, second, third = (results(tmp_path / str(n))["start"]["metrics"] for n in range(3))
    assert first == second
    assert "forget_quality" not in first
    assert third["forget_quality"] < 1
    assert counts[1] < counts[0] == counts[2]


def test_limited_generation_is_told(cli: CLI, model_folder: Path, tmp_path: Path):
    cli("test", "--eval.generate_rows", "2", "--run_dir", str(tmp_path / "r"))
    counts = results(tmp_path / "r")["counts"]
    assert counts["forget/rouge"] == 2
    assert counts["forget/probability"] == 10


def test_chosen_splits_and_no_generation(cli: CLI, tmp_path: Path):
    """The scores that are left do not change; what rests on the others is said to be missing."""
    for name, options in {
        "all": (),
        "forget": ("--eval.splits", "[forget]"),
        "silent": ("--eval.generate_rows", "0"),
    }.items():
        cli("test", *options, "--run_dir", str(tmp_path / name))
    metrics, missing = {}, {}
    for name in ("all", "forget", "silent"):
        content = results(tmp_path / name)
        metrics[name], missing[name] = content["final"]["metrics"], content["unavailable"]
    spoken = ("rouge", "degenerate", "verbatim")
    for name, left in {
        "forget": lambda m: m.startswith("forget/"),
        "silent": lambda m: not m.endswith(spoken),
    }.items():
        expected = {m: value for m, value in metrics["all"].items() if left(m) and m != "model_utility"}
        assert metrics[name] == pytest.approx(expected, rel=1e-6)
    assert missing["forget"]["model_utility"] == "it rests on splits that --eval.splits leaves out"
    for name in ("model_utility", "forget/rouge", "retain/rouge", "retain/degenerate", "forget/verbatim"):
        assert missing["silent"][name] == "no answers are generated, see --eval.generate_rows"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            [],
            [
                "reference: none",
                "objective: SimNPO, beta 3.5, gamma 3.5; forget weight 0.25, retain weight 1 (NLL); lr 0.01",
            ],
        ),
        (["--model.objective", "NPO"], ["its log-probs, made once and kept"]),
        (["--model.retain_loss", "KL"], ["a frozen model, run in every step"]),
        (["--model.retain_loss", "KL", "--model.lora.rank", "2"], ["with its adapter off", "LoRA of rank 2"]),
        (["--model.trainable", "[.*mlp.*]"], ["trained: .*mlp.*"]),
    ],
    ids=["SimNPO", "NPO", "KL", "LoRA", "subset"],
)
def test_plan_of_a_run(
    cli: CLI,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: list[str],
):
    """What is trained and how, on what, and what will be measured and what not."""
    quick = ["--trainer.max_steps", "1", "--eval.start", "false", "--eval.final", "false", "--eval.generate_rows", "0"]
    cli("fit", *quick, *options, "--trainer.limit_val_batches", "0", "--run_dir", str(tmp_path / "run"))
    shown = capsys.readouterr().out
    size = AutoModelForCausalLM.from_pretrained(model_folder).num_parameters() / 1e6
    for part in (*said, f"{size:.4g} million parameters, cpu, precision 32-true", "10 forget rows, 40 retain rows"):
        assert part in shown, part
    assert re.search(
        r"memory: training takes about [\d.]+ MB; cpu has [\d.]+ GB\n  weights .*, activations [\d.]+\n", shown
    )
    assert re.search(r"measured on 10 forget rows, 7 retain rows.*: .*forget prob\., forget truth ratio, ES, EM", shown)
    assert "\nnot measured:\n  " in shown
    assert "\n  forget quality: no retrained model to compare with; give " in shown


def test_chosen_forget_rows(cli: CLI, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Only these are trained on; all are measured."""
    options = ["--trainer.max_epochs", "1", "--eval.start", "false", "--run_dir", str(tmp_path / "r")]
    cli("fit", *options, "--data.forget_rows", "[7, 2, 5]")
    assert "data: 3 forget rows, 40 retain rows" in capsys.readouterr().out
    assert results(tmp_path / "r")["counts"]["forget/probability"] == 10


@pytest.mark.parametrize(
    "objective",
    [["NPO"], ["PDU", "--model.objective.warmup_epochs", "0"], ["SimNPO", "--trainer.max_steps", "8"]],
    ids=lambda o: o[0],
)
def test_resumed_run_ends_like_an_uninterrupted_one(cli: CLI, tmp_path: Path, objective: list[str]):
    """Stopped after one of three epochs, as by a kill, then resumed: the same weights, bit for bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--model.objective", *objective, "--trainer.max_epochs", "3"]
    cli("fit", *options, "--run_dir", str(whole))

    with killed_in_epoch(2):
        cli("fit", *options, "--run_dir", str(cut))
    assert not results(cut)["finished"]
    assert not (cut / "model").exists()
    cli("fit", *options, "--run_dir", str(cut), "--ckpt_path", "last")
    assert same_weights(whole, cut)
    assert results(cut)["final"] == results(whole)["final"]
    assert results(cut)["epochs"] == results(whole)["epochs"]
    assert results(cut)["start"] == results(whole)["start"]
    assert (cut / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()


@pytest.mark.parametrize("options", [[], ["--trainer.max_steps", "5"]], ids=["epochs", "steps"])
def test_run_that_was_stopped_before_its_export_is_completed(cli: CLI, tmp_path: Path, options: list[str]):
    """Stopped between the last epoch and the export: resuming trains nothing, exports and evaluates."""
    import shutil

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cli("fit", *options, "--run_dir", str(whole))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    own = ("settings", "start", "epochs", "counts", "unavailable", "titles", "seconds")
    (cut / "results.json").write_text(json.dumps({name: results(whole)[name] for name in own}))
    cli("fit", *options, "--run_dir", str(cut), "--ckpt_path", "last")
    for name in ("objective", "exported_epoch", "verdict"):
        assert results(cut)[name] == results(whole)[name]
    assert "It is the model after epoch 2." in (cut / "model" / "README.md").read_text()
    assert same_weights(whole, cut)
    assert results(cut)["final"]["metrics"] == pytest.approx(results(whole)["final"]["metrics"], rel=1e-6)
    assert results(cut)["epochs"] == results(whole)["epochs"]


def test_evaluations_within_an_epoch_outlast_a_resume(cli: CLI, tmp_path: Path):
    """Of the steps 1, 2, 4 and 5, with a kill in step 6 of 6 that goes back to step 5."""
    options = ["--trainer.val_check_interval", "2", "--eval.start", "false", "--eval.final", "false"]
    cli("fit", *options, "--run_dir", str(tmp_path / "whole"))
    options += ["--checkpoint.every_steps", "1", "--run_dir", str(tmp_path / "cut")]
    with killed_in_epoch(2, batch=4):
        cli("fit", *options)
    cli("fit", *options, "--ckpt_path", "last")
    assert [(e["epoch"], e["step"]) for e in results(tmp_path / "cut")["epochs"]] == [(1, 1), (1, 2), (2, 4), (2, 5)]
    assert results(tmp_path / "cut")["epochs"] == results(tmp_path / "whole")["epochs"]


def test_resume_with_other_options_is_refused(
    cli: CLI, cli_error: Callable[..., str], model_folder: Path, other_folder: Path, tmp_path: Path
):
    """Neither training nor evaluation would be that of the record; how many rows are in a batch may differ."""
    cut = tmp_path / "cut"
    cli("test", "--run_dir", str(tmp_path / "log"))
    with killed_in_epoch(2):
        cli("fit", "--run_dir", str(cut))
    resume = ["--run_dir", str(cut), "--ckpt_path", "last"]
    for option, value, was in (
        ("eval.truth_ratio", "prob_mean", "geometric"),
        ("data.max_length", "99", "None"),
        ("data.effective_batch", "2", "4"),
        ("model.lr", "0.5", "0.01"),
        ("seed_everything", "7", "0"),
        ("model.name", str(other_folder), str(model_folder)),
        ("trainer.max_epochs", "9", "2"),
    ):
        error = cli_error("fit", *resume, f"--{option}", value)
        assert f"holds a run with {option} {was}, here it is {option} {value}: give its options" in error
    assert "holds a run with model.objective.class_path simnpo_pl" in cli_error(
        "fit", *resume, "--model.objective", "NPO"
    )
    assert "holds a run with eval.retain_log None, here" in cli_error(
        "fit", *resume, "--eval.retain_log", str(tmp_path / "log")
    )
    assert "holds a run of fit: give another folder" in cli_error("test", *resume)
    cli("fit", *resume, "--eval.tokens_per_batch", "512", "--eval.cache_dir", "null")
    assert results(cut)["finished"]


def test_a_run_without_results_keeps_its_options(cli: CLI, cli_error: Callable[..., str], tmp_path: Path):
    options = ["--run_dir", str(tmp_path), "--eval.start", "false", "--trainer.check_val_every_n_epoch", "9"]
    with killed_in_epoch(2):
        cli("fit", *options)
    error = cli_error("fit", *options, "--ckpt_path", "last", "--model.lr", "0.5")
    assert "holds a run with model.lr 0.01, here it is model.lr 0.5" in error


def test_a_folder_is_one_runs(cli: CLI, cli_error: Callable[..., str], tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert f"--run_dir {folder} is in use by another run" in cli_error("fit", "--run_dir", str(folder))
    cli("fit", "--run_dir", str(folder), "--trainer.max_epochs", "1")
    assert not (folder / ".lock").exists()
    (tmp_path / "file").write_text("")
    assert "file is a file: give a folder" in cli_error("fit", "--run_dir", str(tmp_path / "file"))


def test_test_takes_over_no_fit(cli: CLI, cli_error: Callable[..., str], tmp_path: Path):
    with killed_in_epoch(1):
        cli("fit", "--run_dir", str(tmp_path))
    assert not (tmp_path / "last.ckpt").exists()
    assert "holds a run of fit: give another folder" in cli_error("test", "--run_dir", str(tmp_path))


def test_rows_of_a_log_replace_older_ones(cli: CLI, tmp_path: Path):
    cli("test", "--run_dir", str(tmp_path / "log"))
    rows = tmp_path / "run" / "retrained_rows.jsonl"
    rows.parent.mkdir()
    rows.write_text("{}\n")
    cli("test", "--run_dir", str(rows.parent), "--eval.retain_log", str(tmp_path / "log"))
    assert json.loads(rows.read_text().splitlines()[0])["split"] == "forget"


def test_answers_and_scores_are_resumed_apart(cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`predict` in the folder of a killed `test`: a batch to generate has the number of one to score."""
    from simnpo_pl.module.policy import PolicyModule

    with monkeypatch.context() as patch:
        patch.setattr(PolicyModule, "on_test_epoch_end", lambda self: sys.exit(1))
        with pytest.raises(SystemExit):
            cli("test", "--run_dir", str(tmp_path))
    cli("predict", "--run_dir", str(tmp_path))
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 25


def test_a_checkpoint_is_measured_and_not_attacked(
    cli: CLI, cli_error: Callable[..., str], tmp_path: Path, finished: Path
):
    """Commands over a run would take its start model; its log is that of an unlearned model."""
    from simnpo_pl.studies.reopen import finished_runs

    file = finished / "last.ckpt"
    cli("test", "--ckpt_path", str(file), "--run_dir", str(tmp_path / "run"))
    final = results(tmp_path / "run")["final"]["metrics"]
    assert final["forget/probability"] == results(finished)["final"]["metrics"]["forget/probability"]
    with pytest.raises(UserError, match=f"measured {file}, which is no model folder: give the fit that wrote it"):
        finished_runs([tmp_path / "run"])
    error = cli_error("test", "--eval.retain_log", str(tmp_path / "run"), "--run_dir", str(tmp_path / "other"))
    assert f"the model it is of was unlearned in {finished}" in error


def test_stop_in_the_middle_of_an_epoch(cli: CLI, tmp_path: Path):
    """The final evaluation is of the weights after the last step, not of the epoch before."""
    folder = tmp_path / "run"
    cli("fit", "--trainer.max_steps", "5", "--run_dir", str(folder))
    content = results(folder)
    assert [e["step"] for e in content["epochs"]] == [3]
    assert content["final"]["metrics"]["forget/probability"] != content["epochs"][0]["metrics"]["forget/probability"]
    cli("test", "--model.name", str(folder / "model"), "--run_dir", str(tmp_path / "check"))
    final, check = content["final"]["metrics"], results(tmp_path / "check")["final"]["metrics"]
    assert final == pytest.approx(check, rel=1e-5)


def test_flags_win_over_the_checkpoint(cli: CLI, finished: Path, tmp_path: Path):
    """A checkpoint brings weights and training state; settings come from config and flags."""
    folder = tmp_path / "more"
    options = ["--trainer.max_epochs", "3", "--model.forget_weight", "0.5", "--run_dir", str(folder)]
    cli("fit", *options, "--ckpt_path", str(finished / "last.ckpt"))
    assert results(folder)["settings"]["model"]["forget_weight"] == 0.5
    assert [e["epoch"] for e in results(folder)["epochs"]] == [3]


def test_best_epoch_is_exported_by_the_named_metric(cli: CLI, tmp_path: Path):
    folder = tmp_path / "best"
    cli("fit", "--export.best", "forget/probability", "--export.mode", "max", "--run_dir", str(folder))
    content = results(folder)
    values = [e["metrics"]["forget/probability"] for e in content["epochs"]]
    assert content["exported_epoch"] == 1 + values.index(max(values))
    assert content["final"]["metrics"]["forget/probability"] == max(values)
    cli("test", "--model.name", str(folder / "model"), "--run_dir", str(tmp_path / "check"))
    check = results(tmp_path / "check")["final"]["metrics"]["forget/probability"]
    assert check == pytest.approx(max(values), rel=1e-5)


def test_objectives_train(cli: CLI, tmp_path: Path, other_folder: Path):
    memorizing = ["--model.memorizing", str(other_folder)]
    rmu = ["--model.objective.layer", "1", "--model.retain_loss", "EmbedDiff", "--model.retain_loss.layer", "0"]
    short = [
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.check_val_every_n_epoch",
        "9",
    ]
    plain = ["NPO", "DPO", "IDK", "GradDiff", "GradAscent", "WGA", "SatImp", "CEU", "UNDIAL", "PDU"]
    plain += ["SimNPORawLogits", "NPORawLogits"]
    for objective, *options in (*([name] for name in plain), ["RMU", *rmu], ["RKLD", *memorizing]):
        named = ["--model.objective", objective, *options, *short, "--eval.final", "false"]
        cli("fit", *named, "--run_dir", str(tmp_path / objective))
        assert results(tmp_path / objective)["finished"]
        assert (tmp_path / objective / "model" / "model.safetensors").is_file()


def test_finetune_config_makes_models(run_options: list[str], tmp_path: Path):
    from simnpo_pl.__main__ import main

    options = ["--config", "configs/finetune.yaml", *run_options[2:], "--data.train_split", "retain90[:6]+forget10[:2]"]
    main(["fit", *options, "--run_dir", str(tmp_path / "start"), "--debug"])
    content = results(tmp_path / "start")
    assert content["finished"]
    assert "start" not in content
    assert (tmp_path / "start" / "model" / "model.safetensors").is_file()


def test_two_processes_are_as_good_as_one(run_options: list[str], finished: Path, other_folder: Path, tmp_path: Path):
    """Two gloo processes: the same losses at every step, the same metrics, every row once."""
    folder = tmp_path / "two"
    command = [sys.executable, "-m", "simnpo_pl", "fit", *run_options, "--config", "configs/hardware/ddp.yaml"]
    command += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--run_dir", str(folder)]
    command += ["--eval.retrained", str(other_folder), "--eval.cache_dir", str(tmp_path / "cache"), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = results(finished), results(folder)
    assert two["start"]["metrics"] == pytest.approx(one["start"]["metrics"], rel=1e-5)
    assert two["retrained"]["metrics"] == pytest.approx(one["retrained"]["metrics"], rel=1e-5, nan_ok=True)
    for a, b in zip(one["epochs"], two["epochs"], strict=True):
        assert b["step"] == a["step"]
        assert b["metrics"] == pytest.approx(a["metrics"], rel=2e-3)
    assert two["counts"] == one["counts"]
    rows = [[json.loads(line) for line in (f / "rows.jsonl").read_text().splitlines()] for f in (finished, folder)]
    assert [(r["split"], r["index"], r["question"]) for r in rows[0]] == [
        (r["split"], r["index"], r["question"]) for r in rows[1]
    ]
    assert all("generation" in r for r in rows[1])
    assert losses(folder) == pytest.approx(losses(finished), rel=1e-4)
    weights = [
        [json.loads(line) for line in (f / "weights.jsonl").read_text().splitlines()] for f in (finished, folder)
    ]
    assert len(weights[1]) == 20
    for a, b in zip(*weights, strict=True):
        assert b == pytest.approx(a, rel=1e-3)


def test_interrupt_saves_what_is_there(run_options: list[str], tmp_path: Path):
    """Ctrl-C in training: no traceback, results and checkpoint of the epochs before, and a resume that works."""
    folder = tmp_path / "stopped run"
    command = [sys.executable, "-m", "simnpo_pl", "fit", *run_options, "--run_dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--trainer.max_epochs", "10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (folder / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"--run_dir '{folder}' --ckpt_path last" in err
    assert torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert results(folder)["epochs"]
    assert not results(folder)["finished"]
