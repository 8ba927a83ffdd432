"""What comes on top of a step and before the first one: Lightning, logging, imports, reading a model."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from bench.data import Rows, batch_of, model_of
from bench.measure import median
from simnpo_pl.benchmarks.demo import train_tokenizer
from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.module.optimization import adamw
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import Models, SimNPO
from simnpo_pl.objectives.base import batch_losses
from simnpo_pl.objectives.retain import NLL
from simnpo_pl.runs.progress import ProgressBar

VOCABULARY, WIDTH, LAYERS = 1536, 64, 2
"""A model whose step takes a few milliseconds, so that what is added to it shows."""


FIRST_STEP = "processor seconds to the first step:"


class FirstStep(pl.Callback):
    """Says when the first step is made."""

    def on_train_batch_end(self, trainer: Any, module: Any, *batch: Any) -> None:
        """Say it once."""
        if trainer.global_step == 1:
            print(FIRST_STEP, time.process_time(), flush=True)


class _Clock(pl.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.process_time())


def added_by_lightning(steps: int) -> dict[str, float]:
    """Milliseconds of processor time a step: a plain loop, the Trainer, and the Trainer that logs and shows a bar."""
    batches = _batches(steps)
    with tempfile.TemporaryDirectory() as folder:
        model_of(VOCABULARY, WIDTH, LAYERS).save_pretrained(folder)
        ways = {
            "plain loop": lambda: _loop(batches),
            "Trainer": lambda: _trainer(folder, batches, log=False),
            "Trainer, logging, bar": lambda: _trainer(folder, batches, log=True),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        threads = torch.get_num_threads()
        # Further threads wait for work by turning round, which would count as the Trainer's time.
        torch.set_num_threads(1)
        try:
            for _ in range(3):
                for name, way in ways.items():
                    found[name].append(1000 * median(way()))
        finally:
            torch.set_num_threads(threads)
    return {name: median(values) for name, values in found.items()}


def start_up(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds, `wall` and `cpu`, to the help and a report, and of `fit` on a small model to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        taken = {"fit, to its first step": [_first_step(Path(folder), n) for n in range(repeats)]}
        report = ["report", f"{folder}/run0", "-o", f"{folder}/report.html"]
        for arguments in (["--help"], report):
            taken[arguments[0]] = [_seconds(arguments) for _ in range(repeats)]
    return {
        name: {"wall": median([wall for wall, _ in of]), "cpu": median([cpu for _, cpu in of])}
        for name, of in taken.items()
    }


def _batches(count: int) -> list[Any]:
    rows = Rows(VOCABULARY)
    return [{"forget": batch_of(rows.training(4)), "retain": batch_of(rows.training(4))} for _ in range(count)]


def _loop(batches: Sequence[Any]) -> list[float]:
    model = model_of(VOCABULARY, WIDTH, LAYERS).train()
    scorer, optimizer = Scorer(model), adamw(model, 1e-5, (0.9, 0.999), 0.01)
    objective, retain_loss, models = SimNPO(), NLL(), Models(scorer)
    times = []
    for batch in batches:
        start = time.process_time()
        optimizer.zero_grad()
        forget, retain, _ = batch_losses(objective, retain_loss, batch, models)
        (0.125 * forget + retain).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.process_time() - start)
    return times


def _trainer(folder: str, batches: Sequence[Any], log: bool) -> list[float]:
    module, clock = UnlearningModule(folder, objective=SimNPO()), _Clock()
    if not log:
        module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as logs:
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            gradient_clip_val=1.0,
            logger=TensorBoardLogger(logs) if log else False,
            log_every_n_steps=1,
            enable_progress_bar=log,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[clock, *([ProgressBar()] if log else [])],
        )
        loader: Any = DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader)
    return [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "simnpo_pl", *arguments]


def _seconds(arguments: Sequence[str]) -> tuple[float, float]:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(_command(arguments), check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _first_step(folder: Path, number: int) -> tuple[float, float]:
    """Seconds, and processor seconds, until the first step of `fit` is made."""
    if not (folder / "model").exists():
        texts = [f"Where is the {n}th house? It stands in street {n * n}." for n in range(64)]
        tokenizer = train_tokenizer(texts)
        model_of(VOCABULARY, WIDTH, LAYERS).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        for name, half in (("forget", texts[:32]), ("retain", texts[32:])):
            pairs = (text.split("? ") for text in half)
            lines = [json.dumps({"question": f"{question}?", "answer": answer}) for question, answer in pairs]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--model.name", folder / "model", "--data.forget", folder / "forget.jsonl"]
    options += ["--data.retain", folder / "retain.jsonl", "--run_dir", folder / f"run{number}", "--eval.start", "false"]
    options += ["--eval.generate_rows", "2", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    # No rate would make a model with random weights forget.
    options += ["--model.lr", "1e-5", "--trainer.callbacks+", "bench.overhead.FirstStep"]
    command = _command(["fit", "--config", "configs/own.yaml", *map(str, options)])
    start = time.perf_counter()
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    wall, cpu, lines = 0.0, 0.0, []
    with subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if FIRST_STEP in line:
                wall, cpu = time.perf_counter() - start, float(line.partition(FIRST_STEP)[2].split()[0])
    if process.returncode or not wall:
        raise RuntimeError(f"{' '.join(command)} did not train:\n{''.join(lines)[-2000:]}")
    return wall, cpu
