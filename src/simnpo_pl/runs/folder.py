"""What a run leaves behind: results of every evaluation, per-row logs, timings, the resolved config."""

import inspect
import resource
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from simnpo_pl.runs.board import log_evaluation, log_outcome
from simnpo_pl.utils.errors import UserError
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.evaluation.parts import FinishedParts
from simnpo_pl.utils.files import clean, read_json, write_json, write_json_lines, write_text
from simnpo_pl.metrics.logs import RetainLog

RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"


class RunFolder(Callback):
    """Writes a run's folder as the run goes on.

    Args:
        folder: Where to write.
        config: Resolved config, YAML; null writes none.
        settings: Settings to repeat in the results, such as the objective's.
        seed: Seed of the run.
    """

    def __init__(self, folder: Path, config: str | None = None, settings: dict[str, Any] | None = None, seed: int = 0):
        self.folder = folder
        self.config = config
        self.role = "final"
        self.result: EvalResult | None = None
        self.result_step: int | None = None
        self.record: dict[str, Any] = {
            "finished": False,
            "command": sys.argv,
            "seed": seed,
            "versions": _versions(),
            "settings": settings or {},
            "epochs": [],
            "seconds": {},
        }
        self.parts = FinishedParts(folder / ".evaluation")
        self._started = time.monotonic()
        self._before: dict[str, Any] = {}

    def check(self, resume: bool) -> None:
        """See that nothing is written over, and take up the records of a run that is resumed.

        Raises:
            UserError: The folder holds a finished run, or an unfinished one that is not resumed.
        """
        results = self.folder / RESULTS
        if results.is_file():
            earlier = read_json(results)
            if earlier.get("finished"):
                raise UserError(
                    f"--run_dir {self.folder} holds a finished run; give another folder, it is not written over"
                )
            if not resume:
                raise UserError(
                    f"--run_dir {self.folder} holds an unfinished run; resume it with --ckpt_path last, "
                    "or give another folder"
                )
            for key in ("start", "retrained", "epochs", "seconds"):
                if key in earlier:
                    self.record[key] = earlier[key]
            self._before = earlier
        if resume:
            clean(self.folder)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Write the config once the data has been read, so that a mistyped option leaves no folder behind."""
        pl_module.finished_parts = self.parts
        if trainer.is_global_zero and self.config is not None:
            write_text(self.folder / "config.yaml", self.config)

    # -- evaluations -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the epochs that a resumed run goes through again."""
        self.role = "epoch"
        self.record["epochs"] = [e for e in self.record["epochs"] if e["epoch"] <= trainer.current_epoch]
        self.record["objective"] = describe_objective(pl_module)
        self._train_started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note the time spent so far."""
        self._add_seconds("training and epoch evaluations", time.monotonic() - self._train_started)
        self._train_started = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """What follows training is the final evaluation."""
        self.role = "final"

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._evaluation_started = time.monotonic()

    on_test_epoch_start = on_validation_epoch_start
    on_predict_epoch_start = on_validation_epoch_start

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record an evaluation; its role says of which model."""
        self._add_seconds(f"evaluation, {self.role}", time.monotonic() - self._evaluation_started)
        self.take(trainer, pl_module.evaluation_result)

    on_test_end = on_validation_end

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the generated answers."""
        result: EvalResult = pl_module.evaluation_result
        if trainer.is_global_zero:
            write_json_lines(self.folder / PREDICTIONS, result.rows)
            self.parts.drop()

    def take(self, trainer: pl.Trainer, result: EvalResult) -> None:
        """Record a result under the present role; of a reference model only other models' metrics speak."""
        if self.role == "mia_reference":
            return
        entry: dict[str, Any] = {"metrics": result.values}
        if self.role == "epoch":
            self.record["epochs"].append({"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **entry})
        elif self.role != "final":
            self.record[self.role] = entry
            if trainer.is_global_zero:
                write_json_lines(self.folder / f"{self.role}_rows.jsonl", result.rows)
        if self.role in ("epoch", "final"):
            self.result, self.result_step = result, trainer.global_step
        if self.role != "retrained":
            self.record["counts"] = result.counts
            self.record["unavailable"] = result.unavailable
            # The exported model's evaluation repeats an epoch's, unless nothing was trained.
            if self.role != "final" or "objective" not in self.record:
                log_evaluation(trainer, result, trainer.global_step if self.role == "epoch" else 0)
        self._write(trainer)

    def finish(self, trainer: pl.Trainer, data: Any, result: EvalResult | None, epoch: int | None) -> None:
        """Write the final results: all metrics, per-row logs and the benchmark's own files.

        Args:
            trainer: Tells which process writes.
            data: Data module, for the benchmark's own files.
            result: Evaluation of the exported model; None where none was asked for.
            epoch: Epoch of the exported model; None where nothing was trained.
        """
        if epoch is not None:
            self.record["exported_epoch"] = epoch
        if result is not None:
            self.record["final"] = {"metrics": result.values}
            log_outcome(trainer, self.record["settings"], result.values)
        self.record["finished"] = True
        log = data.find_retain_log()
        if log is not None:
            self.record["comparator"] = log.about()
        if trainer.is_global_zero and result is not None:
            write_json_lines(self.folder / "rows.jsonl", result.rows)
            self._write_retrained(log)
            for name, content in data.export(result).items():
                write_json(self.folder / name, content)
        self._write(trainer)
        self.parts.close()
        if trainer.is_global_zero:
            self.parts.drop()

    # -- helpers -----------------------------------------------------------------------------------------

    def _write_retrained(self, log: RetainLog | None) -> None:
        """Keep what the retrained model was compared by, where its rows were read from a log and not scored here."""
        file = self.folder / "retrained_rows.jsonl"
        if log is not None and not file.exists():
            write_json_lines(file, log.rows())

    def _write(self, trainer: pl.Trainer) -> None:
        # A resumed run adds to what its earlier processes took.
        before = self._before
        total = before.get("seconds", {}).get("total", 0.0) + time.monotonic() - self._started
        peaks = before.get("peak_memory_gib", {})
        self.record["seconds"] = {**self.record["seconds"], "total": round(total, 1)}
        self.record["cpu_seconds"] = round(before.get("cpu_seconds", 0.0) + time.process_time(), 1)
        self.record["peak_memory_gib"] = {k: max(v, peaks.get(k, 0.0)) for k, v in _peak_memory(trainer).items()}
        if trainer.is_global_zero:
            write_json(self.folder / RESULTS, self.record)

    def _add_seconds(self, phase: str, seconds: float) -> None:
        self.record["seconds"][phase] = round(self.record["seconds"].get(phase, 0.0) + seconds, 1)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = (
        "simnpo_pl",
        "torch",
        "lightning",
        "transformers",
        "torchmetrics",
        "datasets",
        "scipy",
        "rouge-score",
    )
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def _peak_memory(trainer: pl.Trainer) -> dict[str, float]:
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if trainer.strategy.root_device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**30
    return {name: round(value, 3) for name, value in peak.items()}


def describe_objective(module: Any) -> dict[str, Any]:
    """Name, settings and weights of a module's objective and retain loss, as they are after all defaults."""
    objective = module.objective
    names = [name for name in inspect.signature(type(objective).__init__).parameters if hasattr(objective, name)]
    return {
        "name": _class_name(objective),
        "settings": {name: getattr(objective, name) for name in names},
        "forget_weight": module.forget_weight,
        "retain_loss": None if module.retain_loss is None else _class_name(module.retain_loss),
        "retain_weight": module.retain_weight,
    }


def _class_name(thing: Any) -> str:
    # The parser's stand-in for a default is a class of its own.
    return next(c.__name__ for c in type(thing).__mro__ if not c.__name__.startswith(("LazyInstance", "_LazyInit")))
