"""A finished run, loaded again: its model and settings for measurements, its results to add to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only

from simnpo_pl.cli.arguments import clear_changed_classes
from simnpo_pl.cli.main import UnlearningCLI, precision, quiet
from simnpo_pl.runs.record import Run, read_runs
from simnpo_pl.studies.launch import RESULTS
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json

KEPT = (
    *("accelerator", "strategy", "devices", "num_nodes", "plugins", "gradient_clip_val", "deterministic"),
    *("max_epochs", "enable_progress_bar"),
)
"""Settings of the run's Trainer that a Trainer over the finished run has, too."""


class LoadedRun(UnlearningCLI):
    """Trainer, module and data of a run, read by the command line; its subcommand does not run."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer on the run's devices that writes no files."""
        given = self._get(self.config_init, "trainer")
        return pl.Trainer(
            **{name: given[name] for name in KEPT},
            precision=precision(given),
            callbacks=kwargs.get("callbacks"),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def finished_runs(folders: list[Path]) -> list[Run]:
    """Runs with an exported model; `UserError` if a folder holds no finished run of `fit`."""
    runs = read_runs(folders)
    for run in runs:
        if not run.finished:
            raise UserError(f"{run.folder} holds an unfinished run; resume it: --run_dir {run.folder} --ckpt_path last")
        if not (run.folder / "model").is_dir():
            raise UserError(f"{run.folder} holds no model/; give the folder of a finished fit")
    return runs


def reopen(run: Run, *options: str) -> LoadedRun:
    """A run whose start model is its exported model, with the retrained model's rows that it kept.

    Further options of `fit` win over the run's.
    """
    quiet()
    kept = run.folder / "retrained_rows.jsonl"
    retrained = str(kept) if kept.is_file() else "null"
    arguments = ["fit", "--config", str(run.folder / "config.yaml"), "--model.name", str(run.folder / "model")]
    arguments += ["--eval.retrained", "null", "--eval.retain_log", retrained, *options]
    return LoadedRun(clear_changed_classes(arguments))


def measure_once(run: Run, group: str, key: str, measure: Callable[..., Any], *settings: Any) -> None:
    """Add `measure(run, *settings)` to a run's results under `group` and `key`, unless they hold it already."""
    if key not in run.record.get(group, {}):
        found = measure(run, *settings)
        add_results(run, lambda results: results.setdefault(group, {}).update({key: found}))


@rank_zero_only
def add_results(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a run's record and its `results.json`, atomically, also while other processes do so."""
    file = run.folder / RESULTS
    with FileLock(run.folder / ".results.lock"):
        content = read_json(file)
        change(content)
        write_json(file, content)
    run.record.clear()
    run.record.update(content)
