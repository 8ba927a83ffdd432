"""What a user gets wrong: one line that says what to do, exit code 2, nothing lost."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simnpo_pl.utils.files import write_json, write_text

Error = Callable[..., str]


def copy_data(source: Path, target: Path, **changed: list[dict[str, Any]]) -> str:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_text(file.read_text())
    for name, rows in changed.items():
        (target / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(target)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.objectivee", "NPO"), "--model.objectivee NPO; the nearest is --model.objective"),
        (("--model.beta", "1"), "error: unrecognized arguments: --model.beta 1; the nearest is --model.objective.beta"),
        (("--lr=1",), "error: unrecognized arguments: --lr=1; the nearest is --model.lr"),
        (("--trainer.max_epoch", "1"), "--trainer.max_epoch 1; the nearest is --trainer.max_epochs"),
        (("--trainer.max_epochs", "ten"), "error: --trainer.max_epochs: expected a whole number or null, got ten"),
        (
            ("--model.objective", "NOP"),
            "no such class; the nearest is NPO; known are AltPO, CEU, DPO, FineTune, GradAscent, "
            "GradDiff, IDK, IHL, JensUn, LengthNormalizedNPO, NPO, "
            "NPORawLogits, PDU, RKLD, RMU, ReferenceFreeNPO, SatImp, SimNPO, SimNPORawLogits, UNDIAL, WGA",
        ),
        (("--model.retain_loss", "NL"), "known are EmbedDiff, JSD, KL, NLL"),
        (("--model.objective", "RKLD"), "name it by --model.memorizing FOLDER"),
        (("--model.objective", "RKLD", "--model.memorizing", "./none"), "--model.memorizing: folder ./none does not"),
        (("--model.objective", "NPO", "--model.reference", "./none"), "--model.reference: folder ./none does not"),
        (("--model.objective.beta", "-1"), "--model.objective.beta must be a number above 0, got -1.0"),
        (("--config", "configs/tofuu.yaml"), "configs/tofuu.yaml does not exist; the nearest is configs/tofu.yaml"),
        (
            ("--config", "./none.yaml"),
            "error: --config: file none.yaml does not exist; run this from the repository's folder, or give the file's",
        ),
        (
            ("--model.objective.betta", "1"),
            "Option 'betta' is not accepted by SimNPO; the nearest is beta; --model.objective.help SimNPO lists",
        ),
        (
            ("--data", "Tofu"),
            "no such class; the nearest is TofuData; known are DemoData, MarkovData, MuseData, OwnData, TofuData",
        ),
        (
            ("--data.forget_splits", "forget10"),
            "error: --data: Option 'forget_splits' is not accepted by TofuData; the nearest is forget_split;",
        ),
        (("--data.max_length", "long"), "error: --data.max_length: expected a whole number or null, got long"),
        (("--model.lr", "fast"), "error: --model.lr: expected a number or 'auto', got fast"),
        (("--model.schedule", "cosine"), "error: --model.schedule: expected 'linear' or 'constant', got cosine"),
        (("--model.objective.beta", "x"), "error: --model.objective.beta: expected a number, got x"),
        (("--model.trainable", "3"), "error: --model.trainable: expected list of text or null, got 3"),
        (
            ("--model.lora.ranks", "1"),
            "error: --model.lora: Option 'ranks' is not accepted by LoraOptions; the nearest is rank;",
        ),
        (("--eval.start", "maybe"), "error: --eval.start: expected true or false, got maybe"),
        (("--seed_everything", "x"), "error: --seed_everything: expected true or false or a whole number, got x"),
        (("--seed_everything", "-1"), "error: --seed_everything must be a whole number from 0 to"),
        (("--config", "missing.yaml"), "missing.yaml"),
        (("--model.name", "./no_such_folder"), "folder ./no_such_folder does not exist"),
        (("--data.path", "./no_such_folder"), "no_such_folder"),
        (("--data.forget_split", "forget42"), "forget42"),
        (
            ("--data.forget_split", "forget5"),
            "--data.forget_split forget5: TOFU has forget01, forget05 and forget10; the nearest is forget05",
        ),
        (("--data.forget_split", "dogs"), "give --data.retain_split too"),
        (("--data.effective_batch", "3"), "3"),
        (("--trainer.accumulate_grad_batches", "3"), "contradicts --data.effective_batch 4 = 1 device(s) x 2 rows x 2"),
        (("--data.template", "Q {question} A"), "{answer}"),
        (("--data.chat_date", "2025-01-01"), "--data.chat_date must be a day such as"),
        (("--data.max_length", "20"), "--data.truncate true"),
        (("--eval.retain_log", "missing.json"), "missing.json"),
        (("--eval.retain_log", "a", "--eval.retrained", "b"), "give one of them"),
        (("--eval.max_new_tokens", "0"), "--eval.max_new_tokens must be at least 1, got 0"),
        (("--eval.generate_rows", "-1"), "--eval.generate_rows must be at least 0, got -1"),
        (("--eval.splits", "[]"), "--eval.splits names no split"),
        (
            ("--eval.splits", "[forgot]"),
            "--eval.splits forgot: no such split; this benchmark measures forget, retain, real_authors, world_facts",
        ),
        (("--data.forget_rows", "[3, 10]"), "--data.forget_rows names row 10, but there are 10, counted from 0"),
        (("--run_dir", "null", "--ckpt_path", "last"), "--ckpt_path last needs --run_dir FOLDER"),
        (("--ckpt_path", "missing.ckpt"), "--ckpt_path missing.ckpt does not exist"),
        (("--export.best", "goodness"), "--export.best goodness is not measured: known are"),
        (("--export.best", "forget_quality"), "no retrained model to compare with"),
        (("--export.best", "model_utility", "--trainer.check_val_every_n_epoch", "9"), "evaluates none of 2"),
        (("--trainer.limit_val_batches", "0"), "above 0"),
        (
            ("--trainer.precision", "64-true"),
            "--trainer.precision 64-true is not supported: give 32-true, bf16-mixed or",
        ),
        (("--trainer.strategy", "ddp_spawn"), "ddp_spawn, ddp_fork and ddp_notebook train in processes that end with"),
        (("--trainer.strategy", "ddp_fork", "--trainer.devices", "2"), "give ddp or fsdp2"),
        (("--trainer.strategy", "ddp_notebook"), "give ddp or fsdp2"),
        (("--trainer.overfit_batches", "1"), "--trainer.overfit_batches is not supported, since every epoch draws its"),
        (
            ("--trainer.limit_train_batches", "1"),
            "--trainer.limit_train_batches 1 ends an epoch inside an optimizer step",
        ),
        (("--trainer.limit_train_batches", "0.7"), "inside an optimizer step of 2 micro-batches: give a multiple of 2"),
    ],
)
def test_options(cli_error: Error, tmp_path: Path, options: tuple[str, ...], message: str):
    assert message in cli_error("fit", "--run_dir", str(tmp_path / "run"), *options)


def test_whole_numbers_stay_whole_after_any_import():
    """A module that writes float before int, as rich does, would have 1 batch read as the share 1.0 of all."""
    code = (
        "import rich.console, simnpo_pl.cli.arguments, lightning as pl; from jsonargparse import ArgumentParser\n"
        "parser = ArgumentParser(); parser.add_class_arguments(pl.Trainer, 'trainer')\n"
        "given = parser.parse_args(['--trainer.limit_train_batches', '1', '--trainer.val_check_interval', '0.5'])\n"
        "print(given.trainer.limit_train_batches, given.trainer.val_check_interval)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1 0.5\n"


def test_setting_of_data_before_a_benchmark(capsys: pytest.CaptureFixture[str]):
    from simnpo_pl.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(["fit", "--data.forget", "rows.jsonl", "--model.name", "MODEL"])
    assert stop.value.code == 2
    said = "error: --data.forget needs a class: give --config FILE or --data first, one of DemoData, "
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "no model is named: give --config FILE of a run, such as configs/demo.yaml, or --model.name MODEL"),
        (["fit", "--config", "configs/sweep/table1.yaml"], "no model is named: give --config FILE of a run, such as"),
        (["fit", "--model.name", "MODEL"], "no benchmark is named: give --config FILE of a run, such as configs/demo"),
        (
            ["sweep", "configs/demo.yaml"],
            "configs/demo.yaml is the config of a run, for fit --config configs/demo.yaml",
        ),
        (["tune", "configs/demo.yaml"], "expected a file such as configs/tune/tofu_forget05.yaml"),
    ],
)
def test_without_the_config_of_a_run(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    from simnpo_pl.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert lines[:-1] == (["loading ..."] if arguments[0] == "fit" else [])


@pytest.mark.parametrize("fails", ["always", "in a layer"])
def test_missing_compiler(cli_error: Error, tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch):
    """It is said before the first evaluation; what fails for a layer only, before the first step."""
    from torch._inductor.exc import InvalidCxxCompiler

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", lambda f, **options: failing if options or fails == "always" else f)
    said = cli_error("fit", "--run_dir", str(tmp_path / "run"), "--model.compile", "true")
    assert said.startswith("error: torch.compile fails here (No working C++ compiler found in")
    assert said.endswith("; leave --model.compile out")
    assert (tmp_path / "run").exists() is (fails == "in a layer")


@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_a_gpu_where_there_is_none(cli_error: Error, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    said = cli_error("fit", "--trainer.accelerator", name)
    assert f"--trainer.accelerator {name}: PyTorch {torch.__version__} finds no such device here; give cpu" in said


def test_predict_without_generation(cli_error: Error, tmp_path: Path):
    said = cli_error("predict", "--run_dir", str(tmp_path / "run"), "--eval.generate_rows", "0")
    assert "predict writes generated answers: leave --eval.generate_rows above 0" in said


def test_mistyped_option_leaves_no_folder(cli_error: Error, tmp_path: Path):
    cli_error("fit", "--run_dir", str(tmp_path / "run"), "--data.forget_split", "forget42")
    assert not (tmp_path / "run").exists()


def test_without_network(cli_error: Error, tmp_path: Path):
    """A hub id without network: the message names the flags for local files and the demo."""
    error = cli_error("fit", "--run_dir", str(tmp_path / "run"), "--model.name", "someone/model")
    assert all(
        word in error for word in ("someone/model", "--model.name FOLDER", "--data.path FOLDER", "configs/demo.yaml")
    )
    error = cli_error("fit", "--run_dir", str(tmp_path / "run"), "--data.path", "someone/data")
    assert all(word in error for word in ("someone/data", "--data.path FOLDER", "configs/demo.yaml"))
    log = "hf://datasets/someone/logs/log.json"
    error = cli_error("fit", "--run_dir", str(tmp_path / "run"), "--eval.retain_log", log)
    assert all(word in error for word in (log, "--eval.retain_log FILE", "--eval.retrained FOLDER"))


def test_rows(cli_error: Error, data_folder: Path, tmp_path: Path):
    forget, retain = rows_of(data_folder, "forget10"), rows_of(data_folder, "retain90")
    cases = {
        "missing column": ({"forget10": [{"question": "Who?"}]}, "answer"),
        "empty answer": ({"forget10": [{"question": "Who?", "answer": " "}]}, "row 0"),
        "duplicate": ({"forget10": [*forget, forget[2]]}, "row"),
        "forget row in retain": ({"retain90": [*retain, forget[1]]}, "retain"),
        "empty split": ({"forget10": []}, "forget10"),
    }
    for number, (changed, message) in enumerate(cases.values()):
        path = copy_data(data_folder, tmp_path / str(number), **changed)
        assert message in cli_error("fit", "--run_dir", str(tmp_path / "run"), "--data.path", path)


def test_rows_to_measure_are_checked_like_those_to_train_on(cli_error: Error, data_folder: Path, tmp_path: Path):
    forget, retain = rows_of(data_folder, "forget10_perturbed"), rows_of(data_folder, "retain_perturbed")
    cases = {
        "forget10_perturbed rows 2 and ": {"forget10_perturbed": [*forget, forget[2]]},
        "forget rows are also retain rows": {"retain_perturbed": [*retain, forget[1]]},
        "holdout rows 0 and 1, counted from 0, have the same": {"holdout": [{"question": "Q?", "answer": "a"}] * 2},
    }
    for number, (message, changed) in enumerate(cases.items()):
        path = copy_data(data_folder, tmp_path / str(number), **changed)
        assert message in cli_error("test", "--data.path", path, "--data.holdout", "holdout" if number == 2 else "null")


def test_perturbed_answers_differ_in_number(cli_error: Error, data_folder: Path, tmp_path: Path):
    rows = rows_of(data_folder, "retain_perturbed")
    rows[3]["perturbed_answer"] = rows[3]["perturbed_answer"][:2]
    path = copy_data(data_folder, tmp_path / "data", retain_perturbed=rows)
    assert "rows have 4 to 7 answers" in cli_error("test", "--data.path", path)
    rows[3]["paraphrased_answer"] = ""
    path = copy_data(data_folder, tmp_path / "other", retain_perturbed=rows)
    assert "row 3 (counted from 0) has no paraphrased_answer" in cli_error("test", "--data.path", path)


def test_tofu_without_wrong_answers(cli_error: Error, data_folder: Path, tmp_path: Path):
    rows = [{**row, "perturbed_answer": []} for row in rows_of(data_folder, "world_facts_perturbed")]
    folder = copy_data(data_folder, tmp_path / "data", world_facts_perturbed=rows)
    error = cli_error("test", "--data.path", folder, "--run_dir", str(tmp_path / "run"))
    assert "world_facts_perturbed: expected wrong answers in perturbed_answer, got empty lists: give them" in error


def test_retrained_log_of_another_split(cli_error: Error, data_folder: Path, tmp_path: Path):
    rows = [
        {
            "split": "forget",
            "index": i,
            "question": f"Q{i}",
            "answer": "A",
            "paraphrase_nll": 1.0,
            "perturbed_nll": [2.0],
        }
        for i in range(10)
    ]
    log = tmp_path / "rows.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "retrained model's log" in cli_error("test", "--eval.retain_log", str(log))
    log.write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    assert "retrained model's log" in cli_error("test", "--eval.retain_log", str(log))


def test_longer_than_the_models_context(cli_error: Error, make_model: Callable[..., Path]):
    """The tokenizer has no such limit: the model's config sets it."""
    error = cli_error("test", "--model.name", str(make_model(0, max_position_embeddings=24)))
    assert re.search(r"\d+ .*24.*--data.truncate true", error)


def test_refusals_and_retain_rows_are_asked_for(
    cli_error: Error, data_folder: Path, model_folder: Path, tmp_path: Path
):
    (Path(copy_data(data_folder, tmp_path / "data")) / "idontknow.jsonl").unlink()
    error = cli_error("fit", "--data.path", str(tmp_path / "data"), "--model.objective", "IDK", "--eval.start", "false")
    assert "give --data.refusals FILE" in error


def test_own_data_without_wrong_answers_has_no_forget_quality(
    run_options: list[str], data_folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    from simnpo_pl.__main__ import main

    options = ["--config", "configs/own.yaml", "--model.name", str(model_folder), *run_options[6:]]
    options += ["--data.forget", str(data_folder / "forget10.json"), "--eval.retain_log", "log.json"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *options, "--data.retain", str(data_folder / "retain90.json")])
    assert stop.value.code == 2
    assert "column perturbed_answer (forget quality) or --data.holdout (PrivLeak)" in capsys.readouterr().err


def test_tokenizer_without_eos(cli_error: Error, model_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    assert "no end-of-sequence token" in cli_error("test", "--model.name", str(folder))


@pytest.mark.parametrize("damage", ["weights", "config", "none"])
def test_damaged_model(cli_error: Error, model_folder: Path, tmp_path: Path, damage: str):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if damage == "weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif damage == "config":
        (folder / "config.json").unlink()
    else:
        (folder / "model.safetensors").unlink()
    assert "--model.name" in cli_error("test", "--model.name", str(folder))


def test_pickled_weights_are_not_loaded(cli_error: Error, model_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    assert "--model.name" in cli_error("test", "--model.name", str(folder))


def test_corrupted_checkpoint(cli_error: Error, tmp_path: Path):
    (tmp_path / "last.ckpt").write_bytes(b"not a checkpoint")
    error = cli_error("fit", "--run_dir", str(tmp_path / "run"), "--ckpt_path", str(tmp_path / "last.ckpt"))
    assert "last.ckpt" in error


def test_answers_are_not_written_over(cli_error: Error, tmp_path: Path):
    (tmp_path / "predictions.jsonl").write_text("")
    assert "holds predictions.jsonl" in cli_error("predict", "--run_dir", str(tmp_path))


def test_weights_are_no_checkpoint(cli_error: Error, model_folder: Path, tmp_path: Path):
    weights = str(model_folder / "model.safetensors")
    error = cli_error("fit", "--run_dir", str(tmp_path / "run"), "--ckpt_path", weights, "--eval.start", "false")
    assert "is damaged or no checkpoint of simnpo_pl" in error


def test_finished_and_unfinished_runs_are_not_written_over(cli_error: Error, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for finished, message in ((True, "holds a finished run"), (False, "resume it with --ckpt_path")):
        (run / "results.json").write_text(json.dumps({"finished": finished}))
        assert message in cli_error("fit", "--run_dir", str(run))
        assert [f.name for f in run.iterdir()] == ["results.json"]


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The write fails, the file of before is still whole and no temporary file stays."""
    file = tmp_path / "results.json"
    write_json(file, {"epoch": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"epoch": 2})
    assert json.loads(file.read_text()) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_full_disk_in_a_run_is_one_line(cli_error: Error, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.ckpt")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device: last.ckpt" in cli_error("fit", "--run_dir", str(tmp_path / "run"))


def test_a_fault_of_the_program_keeps_its_traceback(
    run_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from simnpo_pl.__main__ import main
    from simnpo_pl.cli import main as cli

    def fail(*args: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "plan", fail)
    with pytest.raises(KeyError, match="a bug"):
        main(["test", *run_options, "--run_dir", str(tmp_path)])


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    write_json(tmp_path / "a.json", {"x": [float("nan"), 1.0], "y": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.0], "y": None}
    write_text(tmp_path / "deep" / "b.txt", "é")
    assert re.fullmatch("é", (tmp_path / "deep" / "b.txt").read_text(encoding="utf-8"))


def test_config_that_is_not_yaml(cli_error: Error, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("model: {lr: 1\nname: x")
    assert f"--config {tmp_path / 'bad.yaml'} is not YAML: " in cli_error("fit", "--config", str(tmp_path / "bad.yaml"))
    (tmp_path / "other.yaml").write_text("modle: {lr: 1}")
    error = cli_error("fit", "--config", str(tmp_path / "other.yaml"))
    assert "does not accept option 'modle.lr'; the nearest is --model.lr" in error
