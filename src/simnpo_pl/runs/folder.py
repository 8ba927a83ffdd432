"""Writes the run folder: config, results of every evaluation, rows, times. `runs.record` reads it."""

import inspect
import re
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.evaluation.finished import FinishedBatches
from simnpo_pl.metrics.chance import forget_quality_chance
from simnpo_pl.metrics.logs import RetainLog
from simnpo_pl.runs.board import log_evaluation, log_outcome
from simnpo_pl.runs.card import write_card
from simnpo_pl.runs.checkpoint import LAST
from simnpo_pl.runs.record import Run, differing
from simnpo_pl.runs.verdict import unlearned, verdict
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import clean, read_json, write_json, write_json_lines, write_text

RESULTS = "results.json"
CONFIG = "config.yaml"
FREE = re.compile(
    r"model\.(attn_implementation|gradient_checkpointing)|data\.per_device_batch"
    r"|eval\.(start|final|depth|tokens_per_batch|prompts_per_batch|cache_dir)"
)
"""Options of model, data and evaluation that a resumed run may change: no result depends on them."""
PREDICTIONS = "predictions.jsonl"
DEPTH = "depth.jsonl"
SHARED = ("start", "retrained", "mia_reference", "answers")
"""Roles of models that do not change."""
PACKAGES = ("simnpo_pl", "torch", "lightning", "transformers", "torchmetrics", "datasets", "scipy", "rouge-score")


class RunFolder(Callback):
    """Writes the resolved `config`, YAML, and results as soon as they are known.

    Attributes:
        role: Which model is evaluated next: start, answers (its answers that are trained on), retrained, mia_reference,
            epoch (of the policy), final or depth (hidden states of three models).
        result: Newest evaluation of the policy.
        result_step: Optimizer steps behind that evaluation.
    """

    def __init__(self, folder: Path, config: str, settings: dict[str, Any], seed: int) -> None:
        self.folder = folder
        self.config = config
        self.role = "final"
        self.result: EvalResult | None = None
        self.result_step: int | None = None
        self.record: dict[str, Any] = {
            "finished": False,
            "command": sys.argv,
            "seed": seed,
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
            "settings": settings,
            "epochs": [],
            "seconds": {},
        }
        self.finished = FinishedBatches(folder / ".evaluation")
        self.lock = FileLock(folder / ".lock")
        self.run = Run(folder.name, folder, self.record)
        self._started = time.monotonic()
        # Of a resumed run's earlier processes.
        self._cpu_seconds = 0.0

    def check(self, fit: bool, resume: bool) -> None:
        """Read the record of a resumed run; refuse a folder whose run would be overwritten or changed."""
        config, file, holds = self.folder / CONFIG, self.folder / RESULTS, f"--run_dir {self.folder} holds"
        if self.folder.is_file():
            raise UserError(f"--run_dir {self.folder} is a file: give a folder")
        earlier = read_json(file) if file.is_file() else {}
        if earlier.get("finished"):
            raise UserError(f"{holds} a finished run: give another folder")
        if earlier and not resume:
            raise UserError(f"{holds} an unfinished run: resume it with --ckpt_path last, or give another folder")
        if not fit and ((self.folder / LAST).exists() or "start" in earlier):
            raise UserError(f"{holds} a run of fit: give another folder")
        if resume and config.is_file():
            was, here = differing(_kept_options(config.read_text(), self.config))
            if was:
                raise UserError(f"{holds} a run with {was}, here it is {here}: give its options, or another folder")
        kept = ("start", "epochs", "counts", "unavailable", "titles", "seconds", "peak_memory_gib")
        self.record |= {key: earlier[key] for key in kept if key in earlier}
        self._take_rate(earlier.get("lr_auto"))
        self._started -= self.record["seconds"].get("total", 0.0)
        self._cpu_seconds = earlier.get("cpu_seconds", 0.0)
        if resume:
            rank_zero_only(clean)(self.folder)

    def _take_rate(self, found: dict[str, Any] | None) -> None:
        """Record what `--model.lr auto` found, if anything, and the rate among the settings, in the place of `auto`."""
        if found is not None:
            self.record["lr_auto"] = found
            self.record["settings"]["model"]["lr"] = found["lr"]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # The runs of a study evaluate a model that does not change once.
        shared = trainer.datamodule.eval.cache_dir if self.role in SHARED else None
        pl_module.finished_batches = FinishedBatches(Path(shared).expanduser()) if shared else self.finished
        if trainer.is_global_zero:
            # The data has been read by now: a mistyped option leaves no folder behind.
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"--run_dir {self.folder} is in use by another run: give another folder") from error
            write_text(self.folder / CONFIG, self.config)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        # Training does not start where a resumed run has nothing left to train.
        self.record["objective"] = describe_objective(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.role = "epoch"
        self.record["epochs"] = [e for e in self.record["epochs"] if e["step"] <= trainer.global_step]
        self._take_rate(pl_module.found_rate)
        self._epoch_started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._add_seconds("training and epoch evaluations", self._epoch_started)
        self._epoch_started = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.role = "final"

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._evaluation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._add_seconds(f"evaluation, {self.role}", self._evaluation_started)
        result = pl_module.evaluation_result
        if trainer.sanity_checking or self.role in ("mia_reference", "answers", "depth"):
            # Only metrics of other models, or training rows, are made from it.
            return
        metrics = {"metrics": result.values, "intervals": result.intervals}
        if self.role == "epoch":
            step = trainer.global_step
            # The first evaluation of a resumed run may be a repeated one.
            earlier = [entry for entry in self.record["epochs"] if entry["step"] < step]
            self.record["epochs"] = [*earlier, {"epoch": trainer.current_epoch + 1, "step": step, **metrics}]
        elif self.role != "final":
            self.record[self.role] = metrics
            rank_zero_only(write_json_lines)(self.folder / f"{self.role}_rows.jsonl", result.rows)
        if self.role in ("epoch", "final"):
            self.result, self.result_step = result, trainer.global_step
        if self.role != "retrained":
            self.record |= {"counts": result.counts, "unavailable": result.unavailable, "titles": result.titles}
            # The exported model's evaluation repeats an epoch's, unless nothing was trained.
            if self.role != "final" or not trainer.global_step:
                log_evaluation(trainer, result, trainer.global_step if self.role == "epoch" else 0)
        self._write(trainer)

    on_test_epoch_start = on_validation_epoch_start
    on_test_end = on_validation_end

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            write_json_lines(self.folder / PREDICTIONS, pl_module.evaluation_result.rows)
            self.finished.drop()

    def finish(self, trainer: pl.Trainer, data: Any, result: EvalResult | None, epoch: int | None, depth: Any) -> None:
        """Write the final results, the rows and the benchmark's own files; None for what there is not.

        `result` is the evaluation of the exported model, `epoch` its epoch, `depth` what `measure_depth` found.
        """
        if epoch is not None:
            self.record["exported_epoch"] = epoch
        if result is not None:
            self.record["final"] = {"metrics": result.values, "intervals": result.intervals}
            if depth is not None:
                add_depth(self.run, self.record, *depth)
        self.record["finished"] = True
        log = data.find_retain_log()
        if log is not None:
            self.record["comparator"] = log.about()
            if log.metrics:
                self.record.setdefault("retrained", {"metrics": log.metrics})
            self._add_chance(log)
        if unlearned(self.record):
            self.record["verdict"] = verdict(self.record)
        if trainer.is_global_zero and result is not None:
            write_json_lines(self.folder / "rows.jsonl", result.rows)
            if log is not None and data.eval.retrained is None:
                write_json_lines(self.folder / "retrained_rows.jsonl", log.rows())
            for name, content in data.export(result).items():
                write_json(self.folder / name, content)
            log_outcome(trainer, self.record)
        self._write(trainer)
        self.finished.close()
        if trainer.is_global_zero:
            self.finished.drop()
            if epoch is not None:
                write_card(self.run)

    def _add_chance(self, log: RetainLog) -> None:
        """What forget quality can tell at this number of rows, from the truth ratios that it compares."""
        start = [row["forget_quality"] for row in self.run.start_rows if row.get("forget_quality") is not None]
        retrained = [row["truth_ratio"] for row in log.splits["forget"].values() if row.get("truth_ratio") is not None]
        if start and retrained:
            self.record["forget_quality_chance"] = forget_quality_chance(torch.tensor(start), torch.tensor(retrained))

    def _add_seconds(self, phase: str, started: float) -> None:
        seconds = self.record["seconds"].get(phase, 0.0) + time.monotonic() - started
        self.record["seconds"][phase] = round(seconds, 1)

    def _write(self, trainer: pl.Trainer) -> None:
        # Linux counts kilobytes, macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
        if trainer.strategy.root_device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**30
        known = self.record.get("peak_memory_gib", {})
        self.record["peak_memory_gib"] = {k: max(round(v, 3), known.get(k, 0.0)) for k, v in peak.items()}
        self.record["seconds"]["total"] = round(time.monotonic() - self._started, 1)
        self.record["cpu_seconds"] = round(self._cpu_seconds + time.process_time(), 1)
        rank_zero_only(write_json)(self.folder / RESULTS, self.record)


def add_depth(run: Run, record: dict[str, Any], entry: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add the Unlearning Depth Score to a record, and its rows to the run's folder."""
    rank_zero_only(write_json_lines)(run.folder / DEPTH, rows)
    record["depth"] = entry
    for name in ("metrics", "intervals"):
        record["final"][name] = record["final"].get(name, {}) | entry[name]
    record["counts"] = record.get("counts", {}) | dict.fromkeys(entry["metrics"], entry["n"])
    reason = "one of its scores is not a number"
    if not entry["n"]:
        reason = "the retrained model's hidden states lack nothing of any forget row, in any layer"
    lost = [name for name, value in entry["metrics"].items() if value != value]
    others = {name: why for name, why in record.get("unavailable", {}).items() if name not in entry["metrics"]}
    record["unavailable"] = others | dict.fromkeys(lost, reason)


def _kept_options(*configs: str) -> list[dict[str, Any]]:
    """Of resolved configs, the options that a resumed run must not change, by their names; without new ones."""
    found: list[dict[str, Any]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(name if key == "init_args" else f"{name}.{key}", inner)
        elif not FREE.fullmatch(name):
            found[-1][name] = value

    for config in configs:
        found.append({})
        content = yaml.safe_load(config)
        for group in ("model", "data", "eval", "seed_everything"):
            add(group, content.get(group))
        for name in ("max_epochs", "gradient_clip_val", "gradient_clip_algorithm"):
            add(f"trainer.{name}", content["trainer"].get(name))
    return [{name: one[name] for name in one if all(name in other for other in found)} for one in found]


def describe_objective(module: Any) -> dict[str, Any]:
    """Name, settings and weights of a module's objective and retain loss, after all defaults, and its update rule."""
    rule = module.update
    return {
        "name": _class_name(module.objective),
        "settings": _settings(module.objective),
        "forget_weight": module.forget_weight,
        "retain_loss": None if module.retain_loss is None else _class_name(module.retain_loss),
        "retain_weight": module.retain_weight,
        "update": rule and {"name": _class_name(rule), "settings": _settings(rule)},
    }


def _settings(instance: Any) -> dict[str, Any]:
    names = inspect.signature(type(instance).__init__).parameters
    return {name: getattr(instance, name) for name in names if hasattr(instance, name)}


def _class_name(instance: Any) -> str:
    # The parser's stand-in for a default is a subclass.
    return next(c.__name__ for c in type(instance).__mro__ if not c.__name__.startswith(("LazyInstance", "_LazyInit")))
