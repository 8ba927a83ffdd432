"""Nothing is lost: kills and signals at any moment, and a resumed run that ends as an uninterrupted one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import history, results, same_run, same_weights
from simnpo_pl.data.pairing import PairedSampler
from simnpo_pl.evaluation.finished import FinishedBatches
from simnpo_pl.evaluation.plan import share_of
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.runs.checkpoint import CheckpointOptions, SaveState, Stopped, StopSignals
from simnpo_pl.runs.folder import RunFolder
from simnpo_pl.runs.history import GradientWeights
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import clean, recover, replace

CLI = Callable[..., None]
# Dropout: what a step draws has to be the same after a resume, too.
RUN = ["--model.objective", "NPO", "--model.lora.rank", "4", "--model.lora.dropout", "0.2", "--eval.cache_dir", "null"]


class Killed(BaseException):
    """A kill: nothing of ours handles it."""


@contextmanager
def killed(owner: type, name: str, when: Callable[..., bool], after: bool = False) -> Iterator[None]:
    """Ends the run inside where a method is called for which `when` holds."""
    original = getattr(owner, name)

    def kill(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs) if after else None
        if when(*args):
            raise Killed
        return result if after else original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, kill)
        with pytest.raises(Killed):
            yield


@pytest.fixture(scope="module")
def whole(run_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two epochs of three steps, two micro-batches each."""
    from simnpo_pl.__main__ import main

    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["fit", *run_options, *RUN, "--run_dir", str(folder), "--debug"])
    return folder


SLOW = pytest.mark.slow


@pytest.mark.parametrize("step", [pytest.param(1, marks=SLOW), 2, 3, pytest.param(4, marks=SLOW)])
def test_stop_after_any_step(cli: CLI, whole: Path, tmp_path: Path, step: int):
    """Also after the last one of an epoch, before its evaluation; with an evaluation or without one."""
    cut = tmp_path / "cut"
    options = [*RUN, "--checkpoint.every_steps", "1", "--run_dir", str(cut)]
    with killed(SaveState, "save", lambda self, trainer: trainer.global_step == step, after=True):
        cli("fit", *options)
    cli("fit", *options, "--ckpt_path", "last")
    assert same_run(whole, cut)


@SLOW
def test_stop_after_the_last_step_of_an_epoch_without_evaluation(cli: CLI, tmp_path: Path):
    runs = []
    for name in ("whole", "cut"):
        runs.append(tmp_path / name)
        options = [*RUN, "--trainer.check_val_every_n_epoch", "2", "--eval.start", "false", "--run_dir", str(runs[-1])]
        options += ["--checkpoint.every_steps", "3"]
        if name == "cut":
            with killed(SaveState, "save", lambda self, trainer: trainer.global_step == 3, after=True):
                cli("fit", *options)
            options += ["--ckpt_path", "last"]
        cli("fit", *options)
    assert same_run(*runs)


@pytest.mark.parametrize("steps", [4, 2])
def test_run_that_ended_within_an_epoch_goes_on(cli: CLI, tmp_path: Path, steps: int):
    """By max_steps, or by a stop in the middle of an effective batch, as max_time may ask for it."""
    options = ["--model.schedule", "constant", "--eval.start", "false", "--eval.final", "false"]
    options += ["--trainer.limit_val_batches", "0", "--run_dir"]
    runs = [tmp_path / name for name in ("whole", "ended", "longer")]
    cli("fit", *options, str(runs[0]))

    def stop(self: Any, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop |= steps == 2 and batch_idx == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "on_train_batch_end", stop, raising=False)
        cli("fit", *options, str(runs[1]), *(["--trainer.max_steps", "4"] if steps == 4 else []))
    cli("fit", *options, str(runs[2]), "--ckpt_path", str(runs[1] / "last.ckpt"))
    assert history(runs[0]) == history(runs[1]) + history(runs[2])
    assert len(history(runs[1])) == steps
    assert same_weights(runs[0], runs[2])


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=SLOW), pytest.param(5, marks=SLOW)])
def test_evaluations_within_an_epoch_are_all_there(cli: CLI, tmp_path: Path, step: int):
    """After every micro-batch, the last before the save, too."""
    runs = [tmp_path / name for name in ("whole", "cut")]
    options = ["--trainer.val_check_interval", "1", "--checkpoint.every_steps", "1", "--eval.generate_rows", "0"]
    cli("fit", *options, "--run_dir", str(runs[0]))
    with killed(SaveState, "save", lambda self, trainer: trainer.global_step == step, after=True):
        cli("fit", *options, "--run_dir", str(runs[1]))
    cli("fit", *options, "--run_dir", str(runs[1]), "--ckpt_path", "last")
    assert same_run(*runs)


@SLOW
def test_kill_within_an_epoch_goes_back_to_the_last_save(cli: CLI, whole: Path, tmp_path: Path):
    """Every two steps: killed in step 6 of 6, step 4 is there; killed before any save, the start is."""
    for name, epoch, batch in (("late", 1, 4), ("early", 0, 0)):
        options = [*RUN, "--checkpoint.every_steps", "2", "--run_dir", str(tmp_path / name)]

        def when(self: Any, trainer: Any, *args: Any, e: int = epoch, b: int = batch) -> bool:
            return trainer.current_epoch == e and args[-1] == b

        with killed(GradientWeights, "on_train_batch_start", when):
            cli("fit", *options)
        assert (tmp_path / name / "last.ckpt").exists() is (name == "late")
        cli("fit", *options, "--ckpt_path", "last")
        assert same_run(whole, tmp_path / name)


@pytest.mark.parametrize("which", [pytest.param("start", marks=SLOW), "epoch", pytest.param("test", marks=SLOW)])
def test_killed_evaluation_resumes_with_its_unfinished_batches(
    cli: CLI, whole: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
):
    """No batch is scored twice, also not those of an evaluation that was whole before the kill."""
    scored: list[int] = []
    keep = FinishedBatches.keep
    monkeypatch.setattr(FinishedBatches, "keep", lambda s, b, o: (scored.append(b["number"]), keep(s, b, o))[1])
    cut = tmp_path / "cut"
    options = [*RUN, "--eval.tokens_per_batch", "512", "--eval.prompts_per_batch", "8", "--run_dir", str(cut)]
    command = "test" if which == "test" else "fit"

    def when(self: Any, batch: dict[str, Any], *args: Any) -> bool:
        in_epoch = self.trainer.state.fn == "fit"
        return batch["number"] == 3 and in_epoch is (which == "epoch")

    with killed(PolicyModule, "_evaluate", when):
        cli(command, *options)
    before = list(scored)
    assert before.count(0) == (2 if which == "epoch" else 1)
    assert before.count(3) == (1 if which == "epoch" else 0)
    cli(command, *options, *([] if which == "test" else ["--ckpt_path", "last"]))
    per_evaluation = max(scored) + 1
    # The start model, two epochs and the exported adapter.
    assert len(scored) == per_evaluation * (1 if which == "test" else 4)
    assert not (cut / ".evaluation").exists()
    if which != "test":
        expected = results(whole)["final"]["metrics"]
        assert results(cut)["final"]["metrics"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_parts_are_for_the_same_weights_and_plan_only(data_folder: Path, model_folder: Path):
    from simnpo_pl.benchmarks import TofuData
    from simnpo_pl.evaluation.finished import identity
    from simnpo_pl.evaluation.options import EvalOptions
    from simnpo_pl.models.loading import load_causal_lm
    from simnpo_pl.models.lora import LoraOptions, inject_adapter

    def plan(seed: int = 0, **options: Any) -> Any:
        data = TofuData(path=str(data_folder), tokenizer=str(model_folder), seed=seed, eval=EvalOptions(**options))
        data.setup("validate")
        return data.evaluation()

    plans = [plan(), plan(max_new_tokens=4), plan(generate_rows=2), plan(splits=["forget"])]
    plans += [plan(min_k=0.1), plan(temperature=1), plan(temperature=2), plan(temperature=1, seed=1)]
    assert plan().digest() == plan(seed=1).digest() == plans[0].digest()
    assert len({one.digest() for one in plans}) == len(plans)
    model = load_causal_lm(str(model_folder))
    before = identity(model, plans[0], 1)
    assert before == identity(load_causal_lm(str(model_folder)), plans[0], 1)
    assert before != identity(model, plans[0], 2)
    model.config.rms_norm_eps *= 2
    assert before != identity(model, plans[0], 1)
    model.config.rms_norm_eps /= 2
    assert before == identity(model, plans[0], 1)
    with torch.no_grad():
        next(model.parameters()).view(-1)[5] += 1e-6
    assert before != identity(model, plans[0], 1)
    adapted = [load_causal_lm(str(model_folder)) for _ in range(3)]
    for one, alpha in zip(adapted, (8, 8, 16), strict=True):
        inject_adapter(one, LoraOptions(rank=4, alpha=alpha))
    found = [identity(one, plans[0], 1) for one in adapted]
    assert found[0] == found[1] != found[2]


def test_lines_cut_short_are_not_whole(tmp_path: Path):
    """Whatever the last bytes of the file are, the lines before count and a cut one does not."""
    batches = share_of([{"x": i} for i in range(3)])
    scores = {"nll": torch.tensor([0.1, float("nan")]), "n": torch.tensor([3])}
    parts = FinishedBatches(tmp_path)
    parts.open("a")
    parts.keep(batches[0], scores)
    parts.keep(batches[1], [[1, 2], []])
    parts.close()
    (file,) = (tmp_path / "a").iterdir()
    content = file.read_bytes()
    for length in range(len(content) + 1):
        file.write_bytes(content[:length])
        again = FinishedBatches(tmp_path)
        again.open("a")
        first = again.found(batches[0])
        assert (first is not None) is (length >= content.index(b"\n"))
        if first is not None:
            torch.testing.assert_close(first, scores, rtol=0, atol=0, equal_nan=True)
        assert again.found(batches[1]) == ([[1, 2], []] if length >= len(content) - 1 else None)
        assert again.found(batches[2]) is None
        again.close()
    again.drop()
    assert not tmp_path.exists()


def test_all_processes_run_a_batch_or_none(tmp_path: Path):
    """Four batches on two processes, of which the first finished 0 and 2, the second 1: only the first turn is over."""
    shares = [share_of([{"x": i} for i in range(4)], rank, 2) for rank in range(2)]
    parts = [FinishedBatches(tmp_path / str(rank)) for rank in range(2)]
    for rank, numbers in enumerate(([0, 2], [1])):
        parts[rank].open("a")
        for batch in shares[rank]:
            if batch["number"] in numbers:
                parts[rank].keep(batch, [[batch["number"]]])
        parts[rank].open("a")
    for own in parts:
        own._everywhere = [set(p._kept) for p in parts]
    for rank in range(2):
        assert [parts[rank].found(batch) for batch in shares[rank]] == [[[rank]], None]


def test_folder_takes_a_name_whole(tmp_path: Path):
    """Killed at each of its moments, a replacement leaves one of the two folders whole."""
    target, fresh = tmp_path / "model", tmp_path / ".model.new"

    def content() -> str | None:
        recover(target)
        return (target / "file").read_text() if target.exists() else None

    for moment in range(3):
        shutil.rmtree(target, ignore_errors=True)
        for folder, text in ((target, "old"), (fresh, "new")):
            folder.mkdir(exist_ok=True)
            (folder / "file").write_text(text)
        calls = 0
        rename = Path.rename

        def stopping(self: Path, to: Path, moment: int = moment, rename: Any = rename) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, to)

        child = os.fork()
        if child == 0:
            Path.rename = stopping  # type: ignore[method-assign, assignment]
            replace(fresh, target)
            os._exit(0)
        os.waitpid(child, 0)
        assert content() == ("old" if moment < 2 else "new")
        clean(tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_a_kill_are_removed(cli: CLI, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".results.json.123.tmp").write_text("{")
    (folder / ".model.new").mkdir()
    cli("fit", "--trainer.max_steps", "1", "--eval.final", "false", "--run_dir", str(folder), "--ckpt_path", "last")
    assert results(folder)["finished"]
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


@SLOW
def test_checkpoint_of_another_cut_in_the_middle_of_an_epoch(cli: CLI, cli_error: Callable[..., str], tmp_path: Path):
    options = ["--eval.start", "false", "--eval.final", "false", "--checkpoint.every_steps", "1"]
    with killed(SaveState, "save", lambda self, trainer: trainer.global_step == 1, after=True):
        cli("fit", *options, "--run_dir", str(tmp_path / "run"))
    saved = ["--ckpt_path", str(tmp_path / "run" / "last.ckpt"), "--run_dir", str(tmp_path / "other")]
    error = cli_error("fit", *options, *saved, "--data.per_device_batch", "1")
    assert (
        "in the middle of an epoch with per_device_batch 2, here it is 1: resume with the settings of its run" in error
    )


def test_cut_of_an_epoch_belongs_to_the_state():
    """In the middle of an epoch the cut must be the same; at its end anything may follow."""
    sampler = PairedSampler(10, 20, 4, 2)
    batches = iter(sampler)
    rest = [next(batches) for _ in range(5)]
    state = sampler.state_dict()
    same = PairedSampler(10, 20, 4, 2)
    same.load_state_dict(state)
    assert list(same) == []
    list(batches)
    sampler.set_epoch(1)
    batches = iter(sampler)
    rest = [next(batches), next(batches)]
    state = sampler.state_dict()
    same.load_state_dict(state)
    same.set_epoch(1)
    assert list(same) == list(batches)
    same.set_epoch(2)
    assert len(list(same)) == len(same)
    other = PairedSampler(10, 20, 4, 1)
    with pytest.raises(UserError, match="in the middle of an epoch with per_device_batch 2, here it is 1: resume with"):
        other.load_state_dict(state)
    assert len(rest) == 2
    list(iter(sampler))
    other.load_state_dict({**state, "all": True})
    other.set_epoch(2)
    assert len(list(other)) == len(other)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", ["every_steps", "every_epochs"])
def test_steps_and_epochs_between_saves_are_checked(number: int, name: str):
    with pytest.raises(UserError, match=f"--checkpoint.{name} must be at least 1, got {number}"):
        CheckpointOptions(**{name: number})


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (None, [])])
def test_epochs_between_saves(tmp_path: Path, every: int | None, expected: list[int]):
    """A signal saves after any epoch."""
    signals = StopSignals()
    state, saved = SaveState(tmp_path, CheckpointOptions(every_epochs=every), signals), []
    state.save = lambda trainer: saved.append(trainer.current_epoch + 1)  # type: ignore[method-assign]
    for epoch in range(4):
        state.on_train_epoch_end(Namespace(current_epoch=epoch, world_size=1, is_last_batch=True), None)
    assert saved == expected
    signals.requested = signal.SIGTERM
    state.on_train_epoch_end(Namespace(current_epoch=4, world_size=1, is_last_batch=True), None)
    assert saved == [*expected, 5]


# -- signals -------------------------------------------------------------------------------------------------


def test_first_signal_is_noted_and_the_second_stops(monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        with pytest.raises(Stopped, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        signals.defer()
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
        # A study passes on the one that its whole process group got.
        signal.raise_signal(signal.SIGTERM)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1)
        with pytest.raises(Stopped, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("options", "step"),
    [(["--trainer.max_steps", "6", "--trainer.max_epochs", "-1"], 5), (["--trainer.max_steps", "4"], 3)],
)
def test_signal_in_the_last_step(cli: CLI, tmp_path: Path, options: list[str], step: int):
    """A resumed run would not go on: the evaluation and the export that follow the step are made before the stop."""
    options = [*options, "--trainer.val_check_interval", "2", "--trainer.logger", "false"]
    options += ["--export.best", "forget/probability", "--export.mode", "max"]
    cli("fit", *options, "--run_dir", str(tmp_path / "whole"))

    def interrupt(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "on_train_batch_start", interrupt, raising=False)
        with pytest.raises(SystemExit) as stop:
            cli("fit", *options, "--run_dir", str(tmp_path / "cut"))
    assert stop.value.code == 143
    cli("fit", *options, "--run_dir", str(tmp_path / "cut"), "--ckpt_path", "last")
    assert same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2"],
        ["--trainer.max_steps", "6", "--trainer.max_epochs", "-1", "--checkpoint.every_steps", "1"],
    ],
    ids=["within an epoch", "at its end"],
)
def test_kill_in_the_last_evaluation(cli: CLI, tmp_path: Path, options: list[str]):
    """Nothing would be left to train from its step on; the evaluation is made all the same, and picks the epoch."""
    options = [*options, "--trainer.logger", "false", "--export.best", "forget/probability"]
    cli("fit", *options, "--run_dir", str(tmp_path / "whole"))
    last = results(tmp_path / "whole")["epochs"][-1]["step"]
    with killed(PolicyModule, "validation_step", lambda self, *_: self.trainer.global_step == last):
        cli("fit", *options, "--run_dir", str(tmp_path / "cut"))
    cli("fit", *options, "--run_dir", str(tmp_path / "cut"), "--ckpt_path", "last")
    assert same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_stop_in_an_evaluation_within_an_effective_batch(cli: CLI, tmp_path: Path):
    """EarlyStopping after the third micro-batch of two a step: the run goes on as if it had not ended."""
    options = ["--model.schedule", "constant", "--eval.start", "false", "--eval.final", "false"]
    runs = [tmp_path / name for name in ("whole", "ended", "longer")]
    cli("fit", *options, "--run_dir", str(runs[0]))
    stop: dict[str, Any] = {"class_path": "lightning.pytorch.callbacks.EarlyStopping"}
    stop["init_args"] = {"monitor": "forget/probability", "stopping_threshold": 0.0, "mode": "max"}
    options += ["--trainer.val_check_interval", "3"]
    cli("fit", *options, "--trainer.callbacks", json.dumps([stop]), "--run_dir", str(runs[1]))
    cli("fit", *options, "--run_dir", str(runs[2]), "--ckpt_path", str(runs[1] / "last.ckpt"))
    assert len(history(runs[1])) == 2
    assert history(runs[0]) == history(runs[1]) + history(runs[2])
    assert same_weights(runs[0], runs[2])


def test_a_stop_that_waits_for_other_epochs_saves_as_usual(cli: CLI, tmp_path: Path):
    """EarlyStopping with min_epochs asks for a stop long before it comes."""
    saved: list[int] = []

    begin = RunFolder.on_train_start

    def ask(self: Any, trainer: Any, pl_module: Any) -> None:
        begin(self, trainer, pl_module)
        trainer.should_stop = True

    def save(self: Any, trainer: Any) -> None:
        saved.append(trainer.global_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "on_train_start", ask)
        patch.setattr(SaveState, "save", save)
        options = ["--trainer.max_epochs", "5", "--trainer.min_epochs", "3", "--trainer.limit_val_batches", "0"]
        cli("fit", *options, "--eval.start", "false", "--eval.final", "false", "--run_dir", str(tmp_path))
    assert saved == [3, 6, 9]


def test_two_interrupts_stop_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as signals:
            signals.defer()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(Stopped, match="SIGINT"):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ignored_interrupts_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.defer()
            signal.raise_signal(signal.SIGINT)
            assert not signals.requested
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("signum", "where"),
    [("SIGINT", "step"), pytest.param("SIGTERM", "step", marks=SLOW), ("SIGTERM", "evaluation"), ("SIGTERM", "final")],
)
def test_signal_saves_and_says_how_to_resume(
    cli: CLI, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], signum: str, where: str
):
    """In the middle of an effective batch, in an epoch's evaluation or in the final one: not a step is done twice."""
    cut, done = tmp_path / "cut", []
    options = [*RUN, "--run_dir", str(cut)]
    number = getattr(signal, signum)
    training, validation = UnlearningModule.training_step, PolicyModule.validation_step

    def train(self: Any, batch: Any, batch_idx: int) -> Any:
        done.append((self.current_epoch, batch_idx))
        if where == "step" and (self.current_epoch, batch_idx) == (0, 2):
            signal.raise_signal(number)
        return training(self, batch, batch_idx)

    def evaluate(self: Any, batch: Any, batch_idx: int) -> Any:
        after = "final" if self.trainer.global_step else "start"
        if where == ("evaluation" if self.trainer.state.fn == "fit" else after) and batch_idx == 0:
            signal.raise_signal(number)
        return validation(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnlearningModule, "training_step", train)
        patch.setattr(PolicyModule, "validation_step", evaluate)
        # The tests' own process may ignore interrupts.
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(SystemExit) as stop:
                cli("fit", *options)
        finally:
            signal.signal(signal.SIGINT, previous)
        assert stop.value.code == 128 + number
        error = capsys.readouterr().err
        assert f"stopped by {signum}; resume with --run_dir {cut} --ckpt_path last" in error
        steps = {"step": 2, "evaluation": 3, "final": 6}
        assert torch.load(cut / "last.ckpt", weights_only=True)["global_step"] == steps[where]
        where = "nowhere"
        cli("fit", *options, "--ckpt_path", "last")
    assert sorted(done) == [(epoch, batch) for epoch in range(2) for batch in range(5)]
    assert same_run(whole, cut)


def test_slurm_job_is_requeued_once_its_state_is_saved(
    cli: CLI, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """SLURM's warning signal, in the middle of an effective batch: saved after it, then `scontrol requeue`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" $(ls {tmp_path}/cut | grep -c last.ckpt) >> {tmp_path}/asked\n'
    )
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    for name, value in {"NTASKS": "1", "JOB_ID": "77", "LOCALID": "0", "PROCID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    options = [*RUN, "--run_dir", str(tmp_path / "cut"), "--ckpt_path", "last"]
    training = UnlearningModule.training_step

    def train(self: Any, batch: Any, batch_idx: int) -> Any:
        if (self.current_epoch, batch_idx) == (0, 2):
            signal.raise_signal(signal.SIGUSR1)
        return training(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearningModule, "training_step", train)
        with pytest.raises(SystemExit) as stop:
            cli("fit", *options)
    assert stop.value.code == 128 + signal.SIGUSR1
    assert (tmp_path / "asked").read_text() == "requeue 77 1\n"
    cli("fit", *options)
    assert same_run(whole, tmp_path / "cut")


@SLOW
def test_kills_from_outside(data_folder: Path, model_folder: Path, tmp_path: Path):
    """One run ended in each way by the stress script."""
    done = subprocess.run(
        [sys.executable, "scripts/chaos.py", "--kills", "1", "--folder", str(tmp_path / "chaos")],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "4 runs ended, 0 mismatches" in done.stdout
