"""A finished run, opened again: its model and settings for what is done to it afterwards, its results to add to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from filelock import FileLock

from simnpo_pl.cli.arguments import clear_changed_classes
from simnpo_pl.cli.main import UnlearningCLI, precision, quiet
from simnpo_pl.runs.folder import RESULTS
from simnpo_pl.runs.record import Run, read_runs
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json

HARDWARE = ("accelerator", "strategy", "devices", "num_nodes", "plugins", "gradient_clip_val", "deterministic")
"""What a Trainer over a finished run takes from the run's own; how long it trains and logs is the caller's to say."""


class Reopened(UnlearningCLI):
    """Trainer, module and data of a run, read by the command line; none of its subcommands is carried out."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer on the run's devices that writes no files."""
        given = self._get(self.config_init, "trainer")
        return pl.Trainer(
            **{name: given[name] for name in HARDWARE},
            precision=precision(given),
            max_epochs=given["max_epochs"],
            enable_progress_bar=given["enable_progress_bar"],
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
    """Runs with an exported model.

    Raises:
        UserError: A folder holds no finished run of `fit`.
    """
    runs = read_runs(folders)
    for run in runs:
        if not run.record.get("finished"):
            raise UserError(f"{run.folder} holds an unfinished run; go on with --run_dir {run.folder} --ckpt_path last")
        if not (run.folder / "model").is_dir():
            raise UserError(f"{run.folder} holds no model/; give the folder of a finished fit")
    return runs


def reopen(run: Run, *options: str) -> Reopened:
    """Settings of a run with its exported model in the start model's place.

    Forget quality compares with the retrained model's rows that the run kept.

    Args:
        run: The finished run.
        options: Further options of `fit`, which win over the run's.
    """
    quiet()
    kept = run.folder / "retrained_rows.jsonl"
    retrained = str(kept) if kept.is_file() else "null"
    arguments = ["fit", "--config", str(run.folder / "config.yaml"), "--model.name", str(run.folder / "model")]
    arguments += ["--eval.retrained", "null", "--eval.retain_log", retrained, *options]
    return Reopened(clear_changed_classes(arguments))


def add_results(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a run's `results.json`, whole or not at all, also where other processes do so at the same time.

    Args:
        run: The run; its `record` is read anew.
        change: Adds to the content, in place.
    """
    file = run.folder / RESULTS
    with FileLock(run.folder / ".results.lock"):
        content = read_json(file)
        change(content)
        write_json(file, content)
    run.record.clear()
    run.record.update(content)
