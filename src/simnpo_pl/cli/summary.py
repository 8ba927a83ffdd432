"""What the terminal shows: the plan before a run and the table after it, and which messages not."""

import logging
import os
import shlex
import shutil
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from simnpo_pl.metrics import titles
from simnpo_pl.models.loading import model_shapes
from simnpo_pl.models.memory import Step, training_bytes
from simnpo_pl.models.sharding import ShardedStrategy
from simnpo_pl.runs.checkpoint import LAST
from simnpo_pl.runs.folder import describe_objective
from simnpo_pl.runs.history import HISTORY, WEIGHTS
from simnpo_pl.runs.record import Run
from simnpo_pl.runs.verdict import exported, headline
from simnpo_pl.utils.files import program

SHOWN = (
    *("forget_quality", "model_utility", "forget/probability", "forget/rouge", "forget/truth_ratio"),
    *("forget/uds", "forget/verbatim", "forget/degenerate", "retain/probability", "retain/degenerate"),
    *("verbmem_forget", "knowmem_forget", "knowmem_retain", "privleak"),
    *("forget/nll", "retain/nll", "probe/nll"),
)
"""Metrics of the table, if they were measured."""
FILES = {
    "model": "exported model, for AutoModelForCausalLM.from_pretrained",
    "results.json": "all metrics, versions, times",
    "rows.jsonl": "scores and generated answers by row",
    "TOFU_EVAL.json": "the same in open-unlearning's format",
    HISTORY: "losses by step",
    WEIGHTS: "gradient weights by forget row and epoch",
    "config.yaml": "resolved config",
    LAST: "training state, for --ckpt_path",
}
COLORS = {"forgotten": "green", "not forgotten": "red", "model damaged": "red"}
"""Of a verdict's category; yellow for the others."""


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print the table of start, retrained and exported model of a results.json, and the verdict."""
    console = console or Console(highlight=False, markup=False)
    last = exported(record) if record["epochs"] or "start" in record else "model"
    rows = {"start": record.get("start"), "retrained": record.get("retrained"), last: record.get("final")}
    found = {model: entry["metrics"] for model, entry in rows.items() if entry}
    custom = {name: titles.Title(**title) for name, title in record.get("titles", {}).items()}
    names = titles.measured(found.values(), (*SHOWN, *custom))
    if not names:
        console.print("nothing was evaluated")
        return
    table = Table(box=SIMPLE_HEAD)
    table.add_column("metric")
    for model in found:
        table.add_column(model, justify="right")
    for name in names:
        title = custom.get(name) or titles.title_of(name)
        unit = f" ({title.unit})" if title.unit else ""
        table.add_row(title.short + unit, *(titles.number(metrics.get(name)) for metrics in found.values()))
    console.print(table)
    if verdict := record.get("verdict"):
        color = COLORS.get(verdict["category"], "yellow")
        _show_list(console, f"verdict: {headline(record)}", verdict["reasons"], f"bold {color}")
        if verdict["untested"]:
            _show_list(console, "not tested:", ["; ".join(verdict["untested"])])
        if verdict["advice"]:
            _show_list(console, "next, one of:", verdict["advice"])


def _show_list(console: Console, head: str, lines: list[str], style: str | None = None) -> None:
    console.print(head, style=style)
    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2)))


def plan(trainer: Any, module: Any, folder: Path, fit: bool) -> str:
    """The run in a few lines: folder, model, device and, for a training run, objective, weights and reference."""
    size = f"{sum(p.numel() for p in model_shapes(module.name).parameters()) / 1e6:,.4g} million parameters"
    lines = [
        f"run: {folder}",
        f"model: {module.name}, {size}, {trainer.strategy.root_device}, precision {trainer.precision}",
    ]
    if fit:
        trained = f", trained: {', '.join(module.trainable)}" if module.trainable else ""
        if module.lora is not None:
            trained = f", LoRA of rank {module.lora.rank} and alpha {module.lora.alpha:g}"
        run = Run("", folder, {"objective": describe_objective(module)})
        long = f"{trainer.max_epochs} epochs" if trainer.max_epochs != -1 else f"{trainer.max_steps} optimizer steps"
        lines += [
            f"objective: {run.method}, {run.settings}; lr {module.lr}{trained}, {long}",
            f"reference: {module.reference_use}",
        ]
        if module.update is not None:
            lines.append(f"update: {module.update.cost}")
    return "\n".join(lines)


def memory(trainer: Any, module: Any, data: Any) -> str:
    """Memory that training takes of a device, estimated from shapes, and what the device has; no weights are loaded."""
    model, settings = module.shapes()
    rows, width = data.micro_batch()
    parts = training_bytes(model, Step(rows, width, **settings, **on_devices(trainer)))
    total, device = sum(parts.values()), trainer.strategy.root_device
    available = _memory_of(device, trainer.num_devices)
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    free = " free" if device.type == "cuda" else ""
    has = "" if available is None else f"; {device} has {available / 1e9:.1f} GB{free}"
    lacks = "" if "activations" in parts else ", activations not counted"
    lines = [
        f"memory: training takes about {total / unit:.1f} {name}{lacks}{has}",
        f"  {', '.join(f'{part} {value / unit:.1f}' for part, value in parts.items())}",
    ]
    if available is not None and total > available:
        lines.append("warning: training may run out of memory; docs/scale.md says what takes less")
    return "\n".join(lines)


def on_devices(trainer: Any) -> dict[str, Any]:
    """The arguments of `memory.Step` that depend on the trainer."""
    strategy = trainer.strategy
    sharded = isinstance(strategy, ShardedStrategy)
    return {
        "autocast": str(trainer.precision).endswith("-mixed"),
        "gpu": strategy.root_device.type != "cpu",
        "shards": trainer.world_size if sharded else 1,
        "buckets": isinstance(strategy, DDPStrategy) and not sharded,
    }


def _memory_of(device: torch.device, processes: int) -> float | None:
    """Free bytes of a GPU, a CPU process's share of the machine's; None if it is not known."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / processes
    return None


def measures(evaluation: Any) -> str:
    """What an `Evaluation` measures, and what it cannot measure and why."""
    rows = ", ".join(f"{len(split.texts)} {split.name} rows" for split in evaluation.splits)
    known, measured = evaluation.titles(), evaluation.names()
    in_order = [*(name for name in titles.TITLES if name in measured), *measured]
    names = ", ".join(dict.fromkeys(_short(name, known) for name in in_order))
    reasons: dict[str, list[str]] = {}
    for name, reason in evaluation.unavailable.items():
        reasons.setdefault(reason, []).append(_short(name, known))
    lost = [f"  {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    generated = any(split.generate for split in evaluation.splits)
    how = f"; {titles.answers_at(evaluation.temperature)}" if generated and evaluation.temperature else ""
    return "\n".join([f"measured on {rows}: {names}{how}", *(["not measured:", *lost] if lost else [])])


def generates(evaluation: Any) -> str:
    """Rows of an `Evaluation` that answers are generated for."""
    rows = ", ".join(f"{split.generate} {split.name} rows" for split in evaluation.splits if split.generate)
    how = f"; {titles.answers_at(evaluation.temperature)}" if evaluation.temperature else ""
    return f"answers are generated for {rows}{how}"


def _short(name: str, known: dict[str, titles.Title]) -> str:
    """A metric's title; the attacks by membership inference have one together."""
    return "membership inference" if name.startswith("mia_") else (known.get(name) or titles.title_of(name)).short


def written(folder: Path, board: bool = True) -> str:
    """The files of a run and how to look at them; `board` if TensorBoard's events are among them."""
    width = max(map(len, FILES))
    files = [f"  {name:{width}}  {what}" for name, what in FILES.items() if (folder / name).exists()]
    report = f"  {program()} -m simnpo_pl report {shlex.quote(str(folder))}"
    tensorboard = [f"  {program('tensorboard')} --logdir {shlex.quote(str(folder.parent))}"] if board else []
    clear = f"this folder and its reports hold the forget rows in clear: pass on only {folder / 'model'}"
    private = [clear] if (folder / "model").exists() else []
    return "\n".join([f"written to {folder}:", *files, *private, "to look at it:", report, *tensorboard])


def say(text: str) -> None:
    """Print lines; in a terminal they are broken between words."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        wrap = textwrap.TextWrapper(width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
        text = "\n".join(map(wrap.fill, text.splitlines()))
    print(text, flush=True)


def quiet() -> None:
    """Print warnings in one line; leave out messages that advertise or repeat what the plan says."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    for message in (
        "treespec, LeafSpec",
        "args parameter is intended to run from within Python",
        "does not have many workers",
        "predict returned None",
        # A process may have had no row of a small split; the others have.
        "was called before the ``update`` method",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
