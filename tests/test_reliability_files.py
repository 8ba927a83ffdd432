"""Full and read-only disks, a hub that vanishes, files cut short: one line, exit code 2, old files intact."""

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simnpo_pl.evaluation import finished
from simnpo_pl.evaluation.finished import FinishedBatches
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.loading import load_causal_lm, load_tokenizer, save_model
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.runs.checkpoint import AtomicCheckpointIO
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json_lines, write_json, write_json_lines

Error = Callable[..., str]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """A disk on which a file takes no more bytes than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("size", [200, 30_000, 200_000])
def test_full_disk_in_a_run(cli_error: Error, tmp_path: Path, size: int):
    """At the first small file, in the checkpoint, late in the checkpoint: one line that names the file."""
    run = tmp_path / "run"
    with disk_of(size):
        error = cli_error("fit", "--eval.cache_dir", "null", "--run_dir", str(run))
    assert "File too large: " in error
    assert "files written before are as they were" in error
    left = [f.name for f in run.rglob("*") if f.name.endswith((".tmp", ".new"))]
    assert left == []


def test_full_disk_keeps_the_checkpoint_of_before(tmp_path: Path):
    io, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"x": torch.arange(10)}, file)
    before = contents(tmp_path)
    for size in (0, 100, 5_000, 200_000):
        with disk_of(size), pytest.raises((OSError, RuntimeError)):
            io.save_checkpoint({"x": torch.zeros(100_000)}, file)
        assert contents(tmp_path) == before
    assert io.load_checkpoint(file)["x"].tolist() == list(range(10))


@pytest.mark.parametrize("size", [100, 20_000])
def test_full_disk_keeps_the_model_of_before(model_folder: Path, tmp_path: Path, size: int):
    """The library that writes weights has errors of its own, which become the system's."""
    model, tokenizer = load_causal_lm(str(model_folder)), load_tokenizer(str(model_folder))
    save_model(model, tokenizer, tmp_path / "model")
    before = contents(tmp_path)
    with torch.no_grad():
        next(model.parameters()).zero_()
    with disk_of(size), pytest.raises(OSError, match="File too large"):
        save_model(model, tokenizer, tmp_path / "model")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("where", ["system", "file"])
def test_folder_that_cannot_be_written(cli_error: Error, model_folder: Path, where: str):
    if where == "system" and not Path("/sys/kernel").is_dir():
        pytest.skip("no folder here that not even root writes to")
    folder = "/sys/simnpo_pl_run" if where == "system" else str(model_folder / "config.json" / "run")
    error = cli_error("fit", "--run_dir", folder)
    assert folder in error
    assert any(word in error for word in ("Operation not permitted", "Permission denied", "Not a directory"))


# -- files that are not what they were -----------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_checkpoint_cut_short_or_changed_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Loaded as it was or refused: no bit flips into a silently different weight."""
    io, file = AtomicCheckpointIO(), tmp_path_factory.getbasetemp() / "changed.ckpt"
    content = {"state_dict": {"a": torch.arange(500.0)}, "loops": {"epoch": 3}}
    io.save_checkpoint(content, file)
    whole = file.read_bytes()
    if data.draw(st.booleans()):
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        position, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
        changed = whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]
    file.write_bytes(changed)
    try:
        loaded = io.load_checkpoint(file)
    except UserError:
        return
    assert torch.equal(loaded["state_dict"]["a"], content["state_dict"]["a"])
    assert loaded["loops"] == content["loops"]


@pytest.mark.parametrize("size", [0, 7, 100, 20_000])
def test_weights_cut_short(cli_error: Error, model_folder: Path, tmp_path: Path, size: int):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:size])
    error = cli_error("test", "--model.name", str(folder), "--run_dir", str(tmp_path / "run"))
    assert f"--model.name: the model in {folder} cannot be loaded" in error


def test_data_cut_short(cli_error: Error, data_folder: Path, tmp_path: Path):
    """In the middle of a line; a file cut between two lines has fewer rows, which nothing tells."""
    folder = tmp_path / "data"
    folder.mkdir()
    for file in data_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    whole = (folder / "forget10.json").read_bytes()
    (folder / "forget10.json").write_bytes(whole[:-20])
    error = cli_error("fit", "--data.path", str(folder), "--run_dir", str(tmp_path / "run"))
    assert "forget10.json line 10: not valid JSON" in error
    assert not (tmp_path / "run").exists()


def test_results_of_a_resumed_run_cut_short(cli_error: Error, tmp_path: Path):
    (tmp_path / "results.json").write_text('{"finished": fal')
    error = cli_error("fit", "--run_dir", str(tmp_path), "--ckpt_path", "last")
    assert f"{tmp_path / 'results.json'} is damaged" in error


OWN_BENCHMARK = """
from simnpo_pl.benchmarks.own import OwnData
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.metrics.answers import RowMean

class OwnMean(RowMean):
    higher_is_better = True

class OwnEvaluation(Evaluation):
    pass

class OwnBenchmark(OwnData):
    def build_evaluation(self, build):
        super().build_evaluation(build)
        forget = build.splits["forget"]
        forget.metrics["forget/own"] = OwnMean("nll", len(forget.texts), scale=self.scale)

    def make_evaluation(self):
        made = super().make_evaluation()
        made.__class__ = OwnEvaluation
        return made
"""


def test_an_evaluation_is_taken_up_for_the_same_code_model_and_rows_only(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The key of kept batches changes with everything their outcomes depend on, and with nothing else."""
    assert EvalOptions().cache_dir is None
    module, package = tmp_path / "own_benchmark.py", tmp_path / "package"
    shutil.copytree(finished.PACKAGE, package)
    monkeypatch.setattr(finished, "PACKAGE", package)
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text(OWN_BENCHMARK)
    rows = [{"question": f"{n}?", "answer": f"It is {n}.", "perturbed_answer": ["No."]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = [{"split": "forget", "index": n, "truth_ratio": 0.5} for n in range(3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    policy = load_causal_lm(str(model_folder))

    def key(scale: float = 1, **options: Any) -> str:
        monkeypatch.delitem(sys.modules, "own_benchmark", raising=False)
        data = importlib.import_module("own_benchmark").OwnBenchmark(
            forget=str(tmp_path / "rows.jsonl"), model=str(model_folder), eval=EvalOptions(**options)
        )
        data.scale = scale
        data.setup("validate")
        module = PolicyModule(str(model_folder), attn_implementation="eager")
        module.policy = policy
        module.finished_batches = FinishedBatches(tmp_path / "kept")
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer: Any = SimpleNamespace(
            datamodule=data, precision="32", global_rank=0, strategy=strategy, predicting=False
        )
        module._trainer = trainer
        module.on_validation_epoch_start()
        return module.finished_batches._path.parent.name

    keys = [key()]
    # Numbers that are made of the outcomes are computed anew.
    same = [key(), key(scale=2), key(truth_ratio="arithmetic"), key(retain_log=str(tmp_path / "log.jsonl"))]
    assert set(same) == set(keys)
    keys.append(key(min_k=0.2))
    keys.append(key(tokens_per_batch=100))
    for file in (package / "metrics" / "functional.py", module):
        file.write_text(file.read_text() + "\n")
        keys.append(key())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    keys.append(key())
    weights = policy.get_input_embeddings().weight.data
    weights[3, 5] *= 1.001
    keys.append(key())
    # The same numbers in another order.
    weights[3, 5:7] = weights[3, 5:7].flip(0)
    keys.append(key())
    weights[[3, 4]] = weights[[4, 3]]
    keys.append(key())
    assert len(set(keys)) == len(keys)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), max_size=4))
def test_lines_come_back_as_they_were(texts: list[str], tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.getbasetemp() / "lines.jsonl"
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    write_json_lines(file, [{"text": text} for text in texts])
    assert read_json_lines(file) == [{"text": text} for text in texts]
    write_json(file, texts)
    assert json.loads(file.read_text(encoding="utf-8")) == texts


# -- a hub that vanishes -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["closes", "cuts"])
def test_hub_that_vanishes(model_folder: Path, data_folder: Path, tmp_path: Path, way: str):
    """At the first request, or in the middle of the weights."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            file = model_folder / self.path.split("?")[0].rsplit("/", 1)[-1]
            if way == "closes":
                self.connection.close()
            elif "/resolve/" not in self.path or not file.is_file():
                self.send_error(404)
            else:
                content = file.read_bytes()
                self.send_response(200)
                for name, value in {"ETag": f'"{file.name}"', "X-Repo-Commit": "a" * 40}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    half = file.suffix == ".safetensors"
                    self.wfile.write(content[: len(content) // 2] if half else content)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "simnpo_pl", "test", "--config", "configs/tofu.yaml"]
    command += ["--model.name", "someone/model", "--data.path", str(data_folder), "--run_dir", str(tmp_path / "run")]
    command += ["--eval.retain_log", "null", "--trainer.accelerator", "cpu"]
    done = subprocess.run(command, env={**os.environ, **hub}, capture_output=True, text=True, timeout=300)
    server.shutdown()
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "someone/model is no folder here and cannot be loaded from the hub" in line
    assert "--model.name FOLDER" in line
