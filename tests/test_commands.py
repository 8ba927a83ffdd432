"""Commands beside Lightning's own: how they are found, what they say of mistakes, and the task vector."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simnpo_pl.__main__ import main, usage
from simnpo_pl.studies import COMMANDS, module_of


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert import_module(module_of(name)).__doc__.split("\n")[0] in shown
    assert re.search(rf"^  {name} +{re.escape(COMMANDS[name])}$", usage(), re.MULTILINE)


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistyped_option(capsys: pytest.CaptureFixture[str]):
    said = error(capsys, "task-vector", "--start", "a", "--overfit", "b", "--out", "c", "--alhpa", "1")
    assert said == "error: unrecognized arguments: --alhpa 1; the nearest is --alpha; --help lists the options\n"


def test_options_are_read_before_torch_is_imported():
    """Help and mistakes are answered at once; of the commands whose options are not in options.py, too."""
    code = (
        "import sys; from simnpo_pl.studies import COMMANDS, parse\n"
        "for name in COMMANDS:\n"
        "    try: parse(name, ['--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_mistyped_command(capsys: pytest.CaptureFixture[str]):
    said = error(capsys, "reprot", "runs/A")
    assert said.startswith(
        "error: reprot: no such command; the nearest is report; known are fit, validate, test, predict, "
    )
    assert all(name in said for name in COMMANDS)


def test_interrupted_while_loading(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simnpo_pl.__main__._run", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_interrupted_loop_of_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(arguments: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr("simnpo_pl.__main__._run", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(["relearn"])
    assert stop.value.code == 130
    assert "interrupted; the same command goes on" in capsys.readouterr().err


def test_task_vector(model_folder: Path, other_folder: Path, tmp_path: Path):
    """By hand: start - 0.5 (overfit - start) = 1.5 start - 0.5 overfit."""
    out = tmp_path / "unlearned"
    options = ["--start", str(model_folder), "--overfit", str(other_folder), "--out", str(out)]
    main(["task-vector", *options, "--alpha", "0.5"])
    start, overfit, found = (load_file(f / "model.safetensors") for f in (model_folder, other_folder, out))
    assert start.keys() == found.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, 1.5 * start[name] - 0.5 * overfit[name])
    assert (out / "tokenizer.json").is_file()


def test_task_vector_refuses(
    model_folder: Path, make_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["task-vector", "--start", str(model_folder), "--overfit", str(make_model(1, num_hidden_layers=1))]
    assert "differ in model.layers.1" in error(capsys, *options, "--out", str(tmp_path / "new"))
    assert not list(tmp_path.iterdir())
    assert "exists already" in error(capsys, *options, "--out", str(tmp_path))
    assert "--alpha: must be at least 0, got -1" in error(
        capsys, *options, "--out", str(tmp_path / "new"), "--alpha=-1"
    )


def test_doctor(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Versions as installed; a hub that nobody listens at; what a config names, here and not here."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    config = tmp_path / "run.yaml"
    data = "  class_path: OwnData\n  init_args: {forget: rows.jsonl, retain: someone/Rows-1.0}"
    config.write_text(f"model:\n  name: {model_folder}\ndata:\n{data}\n")
    main(["doctor", str(config), "--timeout", "1"])
    shown = capsys.readouterr().out
    assert f"  torch {torch.__version__}\n" in shown
    assert "  http://127.0.0.1:9 does not answer (" in shown
    assert f"{config}: model {model_folder} (here); data.forget rows.jsonl (not here); " in shown
    assert "data.retain someone/Rows-1.0 (on the hub, not downloaded)" in shown
    config.write_text("data: {class_path: OwnData, init_args: {forget: rows.jsonl, retain: auto}}")
    made = [
        str(Path(__file__).parents[1] / "configs" / name) for name in ("demo.yaml", "markov.yaml", "markov_paper.yaml")
    ]
    main(["doctor", str(config), *made, "--timeout", "1"])
    shown = capsys.readouterr().out
    assert f"{config}: data.forget rows.jsonl (not here)\n" in shown
    assert all(f"{file}: an overlay, or generated data: needs nothing\n" in shown for file in made)
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "bad.yaml is not YAML" in error(capsys, "doctor", str(tmp_path / "bad.yaml"))
    assert "give a file such as configs/demo.yaml" in error(capsys, "doctor", str(tmp_path / "none.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    assert "expected a mapping, got list" in error(capsys, "doctor", str(tmp_path / "list.yaml"))
    monkeypatch.setenv("HF_ENDPOINT", "here")
    assert "HF_ENDPOINT must be a web address, got here" in error(capsys, "doctor", str(config))


def test_which_part_of_a_run_may_be_passed_on(tmp_path: Path):
    from simnpo_pl.cli.summary import written

    (tmp_path / "model").mkdir()
    said = written(tmp_path).splitlines()
    assert f"this folder and its reports hold the forget rows in clear: pass on only {tmp_path / 'model'}" in said


@pytest.mark.parametrize("on_path", [True, False])
@pytest.mark.parametrize("board", [True, False])
def test_next_commands_work_as_printed(tmp_path: Path, board: bool, on_path: bool, monkeypatch: pytest.MonkeyPatch):
    """An environment that is not active is named by its path; TensorBoard only where it was used."""
    from simnpo_pl.cli.summary import written

    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin") if on_path else "")
    monkeypatch.chdir(tmp_path)
    for name in ("python", "tensorboard"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).touch(0o755)
    said = written(tmp_path / "run", board).splitlines()
    assert not any("pass on only" in line for line in said)
    place = "" if on_path else "bin/"
    assert f"  {place}python -m simnpo_pl report {tmp_path / 'run'}" in said
    assert (f"  {place}tensorboard --logdir {tmp_path}" in said) == board
