"""Sweeps: what a file says becomes commands, runs that are made once, and the paper's table."""

import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from simnpo_pl.__main__ import main
from simnpo_pl.studies import launch
from simnpo_pl.studies.launch import Job, RunFailed, Taken, read_record
from simnpo_pl.studies.plans import read_plan
from simnpo_pl.studies.sweep import Sweep, table
from simnpo_pl.utils.errors import UserError

ROOT = Path(__file__).parents[1]
OVERLAYS = {
    "table1": ["tiny_tofu"],
    "tableA3": ["tiny_tofu"],
    "tableA2": ["tiny_halves", "demo_halves", "smollm2_halves"],
    "table2": ["tiny_muse"],
    "tableA4": ["tiny_wmdp"],
    "figureA1": ["demo_figureA1", "smollm2_figureA1"],
    "figureA2": [],
    "demo_figureA2": [],
    "scalability": ["demo_scalability"],
    "sustainability": ["demo_sustainability"],
}
SWEEP = {
    "title": "A table",
    "folder": "somewhere",
    "table": "tofu",
    "fit": "--config configs/tofu.yaml --eval.retrained {folder}/models/other/model",
    "models": {"other": "--config configs/finetune.yaml --data.train_split retain90"},
    "splits": {"forget10": "", "forget05": "--config configs/tofu_forget05.yaml"},
    "seeds": [3, 4],
    "methods": {"NPO": ["--model.objective NPO", "--run_name {split}-{seed}"], "Vector": "test --model.name x"},
    "after": ["lm-eval {run} --tasks mmlu"],
}


def write(folder: Path, name: str = "sweep", **changed: Any) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**SWEEP, **changed}, sort_keys=False))
    return file


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    capsys.readouterr()
    main(["sweep", *arguments, "--list", "--debug"])
    return [shlex.split(line)[3:] for line in capsys.readouterr().out.splitlines()]


def test_commands_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A model, then splits x methods x seeds, each with its folder, its seed and what follows it."""
    out = str(tmp_path / "runs")
    commands = listed(capsys, str(write(tmp_path)), "--folder", out, "--model.lr", "1e-3")
    assert commands[0] == [
        *("fit", "--config", "configs/finetune.yaml", "--data.train_split", "retain90", "--model.lr", "1e-3"),
        *("--run_dir", f"{out}/models/other"),
    ]
    runs = [command for command in commands[1:] if command[0] != "lm-eval"]
    assert [command[-1].removeprefix(f"{out}/") for command in runs] == [
        f"{split}/{method}/seed-{seed}"
        for split in ("forget10", "forget05")
        for method in ("NPO", "Vector")
        for seed in (3, 4)
    ]
    assert runs[4] == [
        *("fit", "--config", "configs/tofu.yaml", "--eval.retrained", f"{out}/models/other/model"),
        *("--config", "configs/tofu_forget05.yaml", "--model.objective", "NPO", "--run_name", "forget05-3"),
        *("--seed_everything", "3", "--model.lr", "1e-3", "--run_dir", f"{out}/forget05/NPO/seed-3"),
    ]
    assert runs[2][0] == "test"
    assert commands[2] == ["lm-eval", f"{out}/forget10/NPO/seed-3", "--tasks", "mmlu"]


def test_shards_share_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def names(*arguments: str) -> list[str]:
        commands = listed(capsys, str(write(tmp_path)), *arguments)
        return [c[-1] for c in commands if c[0] != "lm-eval" and "/models/" not in c[-1]]

    shares = [names("--shard", f"{i}/3") for i in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(names())
    assert [len(share) for share in shares] == [3, 3, 2]


def test_later_files_change_earlier_ones(tmp_path: Path):
    change = tmp_path / "change.yaml"
    change.write_text("seeds: [0]\nmethods: {NPO: null, GA: --model.objective GradAscent}\nmodels: {other: null}\n")
    sweep = read_plan([write(tmp_path), change], Sweep)
    assert sweep.seeds == [0]
    assert list(sweep.methods) == ["Vector", "GA"]
    assert sweep.models == {}
    assert list(sweep.splits) == ["forget10", "forget05"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": {"A": ""}}, "sweep.yaml: .*method.*; configs/sweep/table1.yaml is an example"),
        ({"seeds": []}, "the sweep has no seeds: name at least one"),
        ({"table": "chairs"}, "the sweep's table is 'chairs'; known are tofu"),
        ({"methods": {"A": "fot --model.lr 1"}}, "begin with an option, or with fit, test, perturb, task-vector"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["sweep", str(write(tmp_path, **changed)), "--list"])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/2", "a/b"])
def test_mistakes_in_options(tmp_path: Path, shard: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["sweep", str(write(tmp_path)), f"--shard={shard}"])
    assert f"--shard: must be I/N with I from 0 to N - 1, such as 0/8, got {shard}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sweep", str(tmp_path / "no.yaml")])
    assert "cannot read" in capsys.readouterr().err


# -- shipped files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words_seen() -> set[str]:
    """Words of commands that were parsed: parsing takes a second, and most commands say nothing new."""
    return set()


def test_shipped_sweeps_are_known():
    known = {*OVERLAYS, *(name for overlays in OVERLAYS.values() for name in overlays)}
    assert {file.stem for file in (ROOT / "configs" / "sweep").iterdir()} == known


@pytest.mark.parametrize(
    "names", [[f, *o] for f, found in OVERLAYS.items() for o in ([], *([n] for n in found))], ids="+".join
)
def test_shipped_sweeps_parse(names: list[str], words_seen: set[str], capsys: pytest.CaptureFixture[str]):
    """Every option of every sweep, as it stands and with its overlays, is understood by the command it is given to."""
    from simnpo_pl.studies import parse

    files = [str(ROOT / "configs" / "sweep" / f"{name}.yaml") for name in names]
    commands = listed(capsys, *files, "--folder", "somewhere")
    assert commands
    for command in commands:
        new = {word for word in command if not re.search(r"seed-\d|^\d+$", word)} - words_seen
        words_seen |= new
        if command[0] not in ("fit", "test"):
            parse(command[0], command[1:])
        elif new:
            with pytest.raises(SystemExit) as stop:
                main([*command, "--print_config"])
            assert stop.value.code == 0
            capsys.readouterr()


# -- runs made once --------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Sequence[str]]]:
    """Puts a stand-in in the place of the program: what it was called with, and a finished run in its folder."""

    def install(code: int = 0, says: str = "") -> list[Sequence[str]]:
        calls: list[Sequence[str]] = []

        def start(command: Sequence[str], log: Path | None = None) -> int:
            calls.append(command[3:])
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                log.write_text(says)
            if "--run_dir" in command:
                folder = Path(command[command.index("--run_dir") + 1])
                seed = int(command[command.index("--seed_everything") + 1]) if "--seed_everything" in command else 0
                metrics = {"forget/rouge": 0.25 + 0.1 * seed, "forget_quality": 0.5, "model_utility": 0.6}
                record = {"finished": code == 0, "seed": seed, "settings": {}, "counts": {"forget_quality": 40}}
                record |= {"final": {"metrics": metrics}, "start": {"metrics": {"forget/rouge": 1.0}}}
                record |= {"retrained": {"metrics": {"forget/rouge": 0.4}}, "versions": {}}
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "results.json").write_text(json.dumps(record))
            return code

        monkeypatch.setattr(launch, "start", start)
        return calls

    return install


def fit_once(
    folder: Path, options: Sequence[str], study: Path, log: Path | None = None, wait: bool = True
) -> dict[str, Any]:
    Job(folder, options, study).make(log, wait)
    return read_record(folder)


def test_a_run_is_made_once(program: Callable[..., list[Sequence[str]]], tmp_path: Path):
    folder = tmp_path / "runs" / "one"
    calls = program(code=2, says="plan\nerror: no such model\n")
    with pytest.raises(RunFailed, match="ended with exit code 2: no such model; its output is in"):
        fit_once(folder, ["--model.lr", "1"], tmp_path, tmp_path / "log.txt")
    calls = program()
    assert fit_once(folder, ["--model.lr", "1"], tmp_path)["finished"]
    kept = ["--eval.cache_dir", str(tmp_path / ".evaluations")]
    assert calls == [["fit", *kept, "--model.lr", "1", "--run_dir", str(folder), "--ckpt_path", "last"]]
    assert fit_once(folder, ["--model.lr", "1"], tmp_path)["finished"]
    assert len(calls) == 1
    with pytest.raises(UserError, match=r"holds a run that was started with other options \(see"):
        fit_once(folder, ["--model.lr", "2"], tmp_path)


def test_a_config_that_changed_is_noticed(program: Callable[..., list[Sequence[str]]], tmp_path: Path):
    program()
    config = tmp_path / "a.yaml"
    config.write_text("model: {lr: 1}\n")
    fit_once(tmp_path / "run", ["--config", str(config)], tmp_path)
    config.write_text("# the same\nmodel: {lr: 1}\n")
    fit_once(tmp_path / "run", ["--config", str(config)], tmp_path)
    config.write_text("model: {lr: 2}\n")
    with pytest.raises(UserError, match="started with other configs"):
        fit_once(tmp_path / "run", ["--config", str(config)], tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*b.yaml"):
        fit_once(tmp_path / "run", ["--config", str(tmp_path / "b.yaml")], tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="this command did not start"):
        fit_once(tmp_path / "own", [], tmp_path)


def test_a_run_that_has_begun_keeps_its_options(program: Callable[..., list[Sequence[str]]], tmp_path: Path):
    """A killed run may have a checkpoint before its first results; one that left nothing may be corrected."""
    folder = tmp_path / "run"
    program(code=-9)
    with pytest.raises(RunFailed):
        fit_once(folder, ["--model.lr", "1"], tmp_path)
    (folder / "results.json").rename(folder / "last.ckpt")
    program()
    with pytest.raises(UserError, match="started with other options"):
        fit_once(folder, ["--model.lr", "2"], tmp_path)
    (folder / "last.ckpt").unlink()
    assert fit_once(folder, ["--model.lr", "2"], tmp_path)["finished"]


def test_every_command_has_its_own_log(program: Callable[..., list[Sequence[str]]], tmp_path: Path):
    program(says="said")
    Job(tmp_path / "run", [], tmp_path, after=[["lm-eval"], ["relearn"]]).make(tmp_path / "log.txt")
    assert sorted(file.name for file in tmp_path.glob("log*")) == ["log.after-1.txt", "log.after-2.txt", "log.txt"]


def test_two_workers_never_take_the_same_run(program: Callable[..., list[Sequence[str]]], tmp_path: Path):
    calls = program()
    with FileLock(tmp_path / ".run.lock"), pytest.raises(Taken):
        fit_once(tmp_path / "run", [], tmp_path, wait=False)
    assert not calls
    fit_once(tmp_path / "run", [], tmp_path, wait=False)
    assert len(calls) == 1


def test_a_stopped_run_stops_the_worker(program: Callable[..., list[Sequence[str]]], tmp_path: Path):
    for code, own in ((143, 143), (-15, 143), (138, 138), (-10, 138)):
        program(code=code)
        with pytest.raises(SystemExit) as stop:
            fit_once(tmp_path / "run", [], tmp_path)
        assert stop.value.code == own


def test_signal_reaches_the_run(tmp_path: Path):
    """SIGTERM to the worker ends its program, and the worker with the program's exit code."""
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('on'); time.sleep(30)"
    assert stopped(script, signal.SIGTERM, tmp_path / "log.txt") == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_not_forgotten(tmp_path: Path, number: int):
    """A program that ends as if there had been no signal is the last one."""
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print('on'); time.sleep(0.5)"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert stopped(script, number, tmp_path / "log.txt") == 128 + number
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def stopped(script: str, number: int, log: Path) -> Any:
    """Exit code of a worker that gets a signal while a script runs."""

    def send() -> None:
        while not (log.is_file() and log.read_text()):
            threading.Event().wait(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as stop:
        launch.start([sys.executable, "-u", "-c", script], log)
    return stop.value.code


def test_table_by_hand(program: Callable[..., list[Sequence[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two seeds with forget ROUGE 0.25 and 0.35: 1 - R is 0.7 with a sample deviation of 0.0707."""
    calls = program()
    file = write(tmp_path, splits={"forget10": ""}, seeds=[0, 1], methods={"A": "", "B": ""}, note="Said below.")
    out = tmp_path / "results" / "table.md"
    main(["sweep", str(file), "--folder", str(tmp_path / "runs"), "-o", str(out), "--shard", "0/2", "--debug"])
    assert "2 of 4 runs are not finished." in out.read_text()
    main(["sweep", str(file), "--folder", str(tmp_path / "runs"), "-o", str(out), "--debug"])
    # A model, four runs, an evaluation after each.
    assert [call[0] for call in calls].count("lm-eval") == 4
    assert len(calls) == 9
    shown = out.read_text()
    assert shown in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    assert rows[0][:5] == ["method", "forget 1-R", "1-P", "T", "FQ"]
    assert [row[0] for row in rows[1:]] == ["Original", "Retrain", "A", "B"]
    assert rows[1][1:3] == ["0", "-"]
    assert (rows[2][1], rows[2][4]) == ("0.6", "1")
    assert rows[3] == ["A", "0.7 ± 0.0707", "-", "-", "0.5", *["-"] * 9, "0.6", "40", "2"]
    assert "Said below." in shown
    assert "not finished" not in shown
    main(["sweep", str(file), "--folder", str(tmp_path / "runs"), "--table", "--debug"])
    assert len(calls) == 9
    capsys.readouterr()
    for options, message in ((["--table", "--model.lr", "9"], "other options"), (["--figure", "x"], "must be .png, ")):
        with pytest.raises(SystemExit):
            main(["sweep", str(file), "--folder", str(tmp_path / "runs"), *options])
        assert message in capsys.readouterr().err


def test_rows_of_different_models(tmp_path: Path):
    """Start models that differ are not averaged, and a value that two of three seeds lack is no mean of three."""
    folder = tmp_path / "runs"
    file = write(tmp_path, table="quality", splits={"all": ""}, seeds=[0, 1, 2], methods={"A": "", "B": "", "C": ""})
    sweep = read_plan([file], Sweep, str(folder))
    for (_, method, seed), job in sweep.runs().items():
        start = {"forget/probability": 0.7 if method == "B" else 0.9}
        final = {"model_utility": None if method == "A" and seed else 0.6 + 0.1 * seed}
        record = {"finished": True, "seed": seed, "versions": {}, "start": {"metrics": start}}
        job.folder.mkdir(parents=True)
        (job.folder / "results.json").write_text(json.dumps({**record, "final": {"metrics": final}}))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(sweep, sweep.runs()).splitlines()[4:9]]
    assert [[row[0], row[3], row[4], row[7]] for row in rows] == [
        ["Original, A, C", "-", "0.9", "3"],
        ["Original, B", "-", "0.7", "3"],
        ["A", "0.6 (1 of 3)", "-", "3"],
        ["B", "0.7 ± 0.1", "-", "3"],
        ["C", "0.7 ± 0.1", "-", "3"],
    ]


def test_failed_runs_do_not_stop_the_others(
    program: Callable[..., list[Sequence[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calls = program(code=3, says="error: bad weather\n")
    file = write(tmp_path, splits={"forget10": ""}, models={}, methods={"A": "", "B": ""})
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(file), "--folder", str(tmp_path / "runs")])
    assert stop.value.code == 2
    assert "error: 4 runs failed, the first: " in capsys.readouterr().err
    assert len(calls) == 4


def test_halves_by_hand(tmp_path: Path):
    """Four rows: the first two as far from the retrained model's as can be, the others the same.

    Of two samples of two without overlap the test's p-value is 2 of the 6 arrangements, 1/3; of like ones it is 1.
    """
    from simnpo_pl.runs.record import Run
    from simnpo_pl.studies.sweep import COLUMNS, value

    ratios = {"rows": [5.0, 6.0, 0.3, 0.4], "retrained_rows": [0.1, 0.2, 0.3, 0.4], "start_rows": [0.1, 0.2, 7.0, 8.0]}
    for name, values in ratios.items():
        rows = [{"split": "forget", "index": i, "truth_ratio": v, "answer_nll": 1.0} for i, v in enumerate(values)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"split": "retain", "index": 0}])))
    run = Run("run", tmp_path, {"final": {"metrics": {"model_utility": 0.5}}})
    names = list(COLUMNS["halves"].values())
    strong, weak, utility, _ = (value(run, "final", name) for name in names)
    assert (strong, weak, utility) == (pytest.approx(1 / 3), 1.0, 0.5)
    assert value(run, "start", names[0]) == 1.0
    assert value(run, "start", names[1]) == pytest.approx(1 / 3)
    assert value(run, "retrained", names[0]) == 1.0


def test_accuracy_column():
    from simnpo_pl.runs.record import Run
    from simnpo_pl.studies.sweep import COLUMNS, value

    run = Run("run", Path(), {"lm_eval": {"final": {"wmdp_bio": {"acc": 0.25}, "mmlu": {"acc": 0.5}}}})
    names = COLUMNS["wmdp_bio"].values()
    assert [value(run, "final", name) for name in names] == [0.75, 0.5]
    assert [value(run, "start", name) for name in names] == [None, None]
