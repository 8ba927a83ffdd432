"""A finished run, loaded again: its model and settings for measurements, its results to add to.

A model that no run of this project made is evaluated first, which makes it a run.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only

from simnpo_pl.benchmarks.answers import START_ANSWERS
from simnpo_pl.benchmarks.builder import NO_RETRAINED
from simnpo_pl.cli.main import TRAINER_DEFAULTS, UnlearningCLI, precision
from simnpo_pl.evaluation.plan import Split
from simnpo_pl.module.depth import UDS
from simnpo_pl.report.robustness import judge
from simnpo_pl.runs.card import write_card
from simnpo_pl.runs.progress import ProgressBar
from simnpo_pl.runs.record import Run, read_runs
from simnpo_pl.runs.verdict import unlearned, verdict
from simnpo_pl.studies.launch import RESULTS, Job
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json

KEPT = (
    *("accelerator", "strategy", "devices", "num_nodes", "plugins", "gradient_clip_val", "gradient_clip_algorithm"),
    *("deterministic", "max_epochs", "enable_progress_bar"),
)
"""Settings of the run's Trainer that a Trainer over the finished run has, too."""
OPENED_WITH = re.compile(r"--(data\.(path|forget|retain|holdout|refusals|alternates)|trainer\..*|model\.dtype)(=.*)?")
"""Options that may differ from the run's: places of its data, devices, precision."""


class LoadedRun(UnlearningCLI):
    """Trainer, module and data of a run, read by the command line; its subcommand does not run."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer on the run's devices that writes no files."""
        given = self._get(self.config_init, "trainer")
        bar = [] if given.enable_progress_bar is False else [ProgressBar()]
        return pl.Trainer(
            **{**TRAINER_DEFAULTS, **{name: given[name] for name in KEPT}},
            precision=precision(given),
            callbacks=[*(kwargs.get("callbacks") or []), *bar],
            logger=False,
            enable_checkpointing=False,
        )

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def read_data(self) -> Any:
        """The data module, with the rows that are measured."""
        self.datamodule.prepare_data()
        self.datamodule.setup("validate")
        return self.datamodule


def runs_of(options: Namespace) -> list[Run]:
    """The runs that a command names; of a model in their place, the run of `test` that evaluates it."""
    given = [word for file in options.config for word in ("--config", file)] + options.fit
    models = [place for place in options.runs if not (place.expanduser() / RESULTS).is_file()]
    names = [word for place, word in enumerate(given) if place == 0 or word.startswith("--")]
    if not models and not all(map(OPENED_WITH.fullmatch, names)):
        raise UserError(
            f"unrecognized arguments: {' '.join(given)}; only a model is evaluated with a config, no run; a run takes "
            "the places of its data (such as --data.path), --trainer options and --model.dtype"
        )
    if models and not options.config:
        raise UserError(
            f"{models[0]} holds no results.json; give folders that fit or test wrote, or, for another model, the "
            "config to evaluate it with: --config FILE"
        )
    folders = {model: options.out / str(model).strip("./~").replace("/", "_") for model in models}
    for model, folder in folders.items():
        Job(folder, [*given, "--model.name", str(model)], options.out, "test").make()
    runs = finished_runs([folders.get(place, place) for place in options.runs])
    return runs if models else [replace(run, options=tuple(given)) for run in runs]


def finished_runs(folders: list[Path]) -> list[Run]:
    """Finished runs; `UserError` if a folder holds none, or one of `fit` without its model."""
    runs = read_runs(folders)
    for run in runs:
        if not run.record.get("finished"):
            raise UserError(f"{run.folder} holds an unfinished run; resume it: --run_dir {run.folder} --ckpt_path last")
        if file := run.record.get("checkpoint"):
            raise UserError(f"{run.folder} measured {file}, which is no model folder: give the fit that wrote it")
        if run.unlearned and not (run.folder / "model").is_dir():
            raise UserError(f"{run.folder} holds no model/; give the folder of a finished fit")
    return runs


def model_of(run: Run) -> str:
    """The model that a run exported, or only evaluated."""
    return str(run.folder / "model") if run.unlearned else run.start_model


def retrained_of(run: Run, given: str | None = None) -> str | None:
    """The retrained model, the control of an attack: the one given, or the run's `--eval.retrained`."""
    return given or run.record["settings"].get("eval", {}).get("retrained")


def reopen(run: Run, *options: str) -> LoadedRun:
    """A run whose start model is its own, with the retrained model's rows that it kept.

    Further options of `fit` win over the run's.
    """
    kept = run.folder / "retrained_rows.jsonl"
    retrained = str(kept) if kept.is_file() else "null"
    arguments = ["fit", "--config", str(run.folder / "config.yaml"), "--model.name", model_of(run)]
    arguments += ["--eval.retrained", "null", "--eval.retain_log", retrained, "--eval.depth", "false"]
    if (answers := run.folder / START_ANSWERS).is_file():
        arguments += ["--data.retain", str(answers)]
    opened = LoadedRun([*arguments, *run.options, *options])
    if any(option.startswith("--data.") for option in run.options):
        splits = opened.read_data().evaluation().splits
        here = {text.get("answer") for split in splits for text in split.texts if split.name == "forget"}
        if here != {row.get("answer") for row in run.rows if row["split"] == "forget"}:
            raise UserError(
                f"{' '.join(run.options)}: these are not the forget rows of {run.folder}; give the run's own"
            )
    return opened


def to_measure(options: Sequence[str]) -> dict[str, Any] | None:
    """The metrics that a `fit` with these options will have, all 0, as its results hold them; None if it fails."""
    try:
        data = LoadedRun(["fit", *options]).read_data()
        given, evaluation, log = data.eval, data.evaluation(), data.find_retain_log()
    except Exception:
        # The run says why.
        return None
    later = [name for name, why in evaluation.unavailable.items() if given.retrained and why == NO_RETRAINED]
    names = dict.fromkeys([*evaluation.names(), *later, *([UDS] if given.depth else [])], 0.0)
    found = {model: {"metrics": names} for model in ("start", "final", "retrained") if getattr(given, model)}
    return found | ({"retrained": {"metrics": log.metrics}} if log else {}) | {"unavailable": evaluation.unavailable}


def among(split: Split, rows: Sequence[Any]) -> set[int]:
    """Rows of a split that are among rows to train on; none if these have another form, such as MUSE's text."""
    known = {tuple(row.input_ids) for row in rows}
    return {index for index, answers in enumerate(split.answers) if tuple(answers[0].input_ids) in known}


def measure_once(
    run: Run, group: str, key: str, measure: Callable[..., Any], *settings: Any, again: bool = False
) -> None:
    """Add `measure(run, *settings)` to a run's results under `group` and `key`, unless they hold it already."""
    if again or key not in run.record.get(group, {}):
        found = measure(run, *settings)
        add_results(run, lambda results: results.setdefault(group, {}).update({key: found}))


def add_results(run: Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a run's record, judge its attacks, and write `results.json`, also while other commands do so."""

    def update(content: dict[str, Any]) -> None:
        change(content)
        judge(content)
        if unlearned(content):
            content["verdict"] = verdict(content)

    # Every process goes on from the same record.
    update(run.record)
    rank_zero_only(_write)(run, update)


def _write(run: Run, update: Callable[[dict[str, Any]], None]) -> None:
    file = run.folder / RESULTS
    with FileLock(run.folder / ".results.lock"):
        content = read_json(file)
        update(content)
        write_json(file, content)
    run.record.clear()
    run.record.update(content)
    if run.unlearned:
        write_card(run)
