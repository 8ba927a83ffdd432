"""The command line: LightningCLI with the order of a whole run and its folder."""

import os
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import simnpo_pl.benchmarks  # noqa: F401  (its classes are known by their short names once imported)
from simnpo_pl.benchmarks.base import PairedData
from simnpo_pl.cli import RUNS
from simnpo_pl.cli.arguments import HelpFormatter, check_accelerator, clear_changed_classes, explain
from simnpo_pl.cli.summary import generates, measures, memory, plan, quiet, say, show, written
from simnpo_pl.evaluation.data import AnswerLosses
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.loading import trust_remote_code
from simnpo_pl.module.checks import check_fit
from simnpo_pl.module.depth import UDS, check_depth, measure_depth
from simnpo_pl.module.policy import PolicyModule, check_trainer
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.runs.checkpoint import LAST, AtomicCheckpointIO, CheckpointOptions, SaveState, Stopped, StopSignals
from simnpo_pl.runs.export import ExportModel, ExportOptions
from simnpo_pl.runs.folder import PREDICTIONS, RunFolder
from simnpo_pl.runs.history import GradientWeights, History
from simnpo_pl.runs.progress import ProgressBar
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import recover

RUN_DIR_VARIABLE = "SIMNPO_PL_RUN_DIR"
TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
USAGE = "python -m simnpo_pl {} --config FILE [--config OVERLAY ...] [--OPTION VALUE ...]"


class UnlearningCLI(LightningCLI):
    """`fit` evaluates the start model, unlearns, exports and evaluates; `validate`, `test`, `predict` only evaluate."""

    resumes = False
    """Whether the run continues the one in its folder."""

    def __init__(self, arguments: list[str]) -> None:
        quiet()
        parser: dict[str, Any] = {"exit_on_error": False, "formatter_class": HelpFormatter, "allow_abbrev": False}
        commands = {name: {**parser, "usage": USAGE.format(name), "description": what} for name, what in RUNS.items()}
        super().__init__(
            UnlearningModule,
            PairedData,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=clear_changed_classes(arguments),
            parser_kwargs={**parser, **commands},
            trainer_defaults=dict(TRAINER_DEFAULTS),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands, with the arguments of the Trainer's methods that are no options."""
        ours = {"ckpt_path", "weights_only", "verbose", "return_predictions"}
        return {name: skipped | ours for name, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str | None, help="Folder of this run; null makes a new one under runs/.")
        parser.add_argument("--label", type=str | None, help="Name of this run in reports; null takes the folder's.")
        parser.add_argument("--ckpt_path", type=str | None, help="Checkpoint to resume; last takes that of --run_dir.")
        remote = "Whether code that comes with a model or tokenizer is run, with all your rights."
        parser.add_argument("--trust_remote_code", type=bool, default=False, help=remote)
        parser.add_class_arguments(EvalOptions, "eval", instantiate=True)
        parser.add_class_arguments(ExportOptions, "export", instantiate=True)
        parser.add_class_arguments(CheckpointOptions, "checkpoint", instantiate=True)
        parser.link_arguments("model.name", "data.init_args.model")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("eval", "data.init_args.eval", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        for word, file in pairwise(map(str, sys.argv[1:] if args is None else args)):
            if word == "--config" and Path(file).is_file():
                try:
                    yaml.safe_load(Path(file).read_text())
                except (yaml.YAMLError, UnicodeDecodeError) as error:
                    raise UserError(f"--config {file} is not YAML: {error}") from error
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(explain(error, self._parser("fit")._option_string_actions)) from error
        seed = self.config[self.config["subcommand"]].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything must be a whole number from 0 to {2**32 - 1}, got {seed}")

    def _parse_ckpt_path(self) -> None:
        """Private to LightningCLI, which would read the whole checkpoint here for settings that ours do not hold."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        trust_remote_code(config.trust_remote_code)
        if config.trainer.precision == "bf16-true":
            # Weights in bfloat16 are what is meant; Lightning would cast buffers, too.
            config.model.dtype, config.trainer.precision = "bfloat16", "32-true"
        if config.ckpt_path == "last":
            if config.run_dir is None:
                raise UserError("--ckpt_path last needs --run_dir FOLDER, the run to resume")
            last = Path(config.run_dir).expanduser() / LAST
            recover(last)
            self.resumes = True
            config.ckpt_path = str(last) if last.exists() else None

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config, made = self.config[self.subcommand], self.config_init[self.subcommand]
        given, folder = made.trainer, self._folder(config)
        strategy, plugins = str(given.strategy), _as_list(given.plugins)
        check_accelerator(given.accelerator)
        settings = {group: config[group].clone().as_dict() for group in ("model", "data", "eval")}
        self.run_folder = RunFolder(folder, self._resolved(config), settings, int(config.seed_everything))
        self.run_folder.record["label"] = config.label
        if self.subcommand != "fit" and config.ckpt_path is not None:
            self.run_folder.record["checkpoint"] = config.ckpt_path
        self.signals = StopSignals(plugins)
        callbacks: list[Any] = [*_as_list(given.callbacks), self.run_folder]
        if given.enable_progress_bar is not False and not any(isinstance(c, AnyProgressBar) for c in callbacks):
            callbacks.append(ProgressBar(self.run_folder))
        if self.subcommand == "fit":
            self.export = ExportModel(folder / "model", made.export)
            callbacks += [self.export, History(folder), GradientWeights(folder)]
            if given.logger is not False:
                callbacks.append(LearningRateMonitor("step"))
        callbacks.append(SaveState(folder, made.checkpoint, self.signals))
        if given.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(str(folder), name="", version="")
        if isinstance(given.strategy, str) and not strategy.startswith("fsdp"):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs, precision=precision(given), callbacks=callbacks)
        check_trainer(trainer)
        return trainer

    # -- the order of a run: LightningCLI calls the method that has the subcommand's name -------------------

    def fit(self, **_: Any) -> None:
        """Plan, start evaluation, training, export, final evaluation, table."""
        with self._stoppable():
            check_fit(self.model, self.trainer)
            self._prepare(fit=True)
            self.export.check(self.trainer, self.model, self.datamodule.evaluation())
            if self._ckpt_path is None and self.datamodule.eval.start:
                self._evaluate_once("start", self.model)
            self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=self._ckpt_path)
            # A run that was stopped after its last step had nothing left to train.
            epoch = self.export.epoch or self.trainer.fit_loop.epoch_progress.current.ready
            if not self.export.folder.is_dir():
                self.export.save(self.trainer, self.model, epoch)
            result = self._final_result() if self.datamodule.eval.final else None
            self._finish(result, epoch, self._depth() if self.datamodule.eval.depth else None)

    def validate(self, **_: Any) -> None:
        """Plan, evaluation, table."""
        with self._stoppable():
            self._prepare()
            # `RunFolder.finish` logs them, as those of the final model.
            self.model.logs_metrics = False
            run = getattr(self.trainer, str(self.subcommand))
            run(self.model, datamodule=self.datamodule, ckpt_path=self._ckpt_path, verbose=False)
            self._finish(result_of(self.model))

    test = validate

    def predict(self, **_: Any) -> None:
        """Plan, generation."""
        file, options = self.run_folder.folder / PREDICTIONS, self.datamodule.eval
        if file.exists():
            raise UserError(f"--run_dir {file.parent} holds {PREDICTIONS}; give another folder")
        if options.generate_rows == 0:
            raise UserError("predict writes generated answers: leave --eval.generate_rows above 0, or null for all")
        options.retain_log = options.retrained = options.mia_reference = None
        with self._stoppable():
            self._prepare()
            self.trainer.predict(self.model, datamodule=self.datamodule, ckpt_path=self._ckpt_path)
            rank_zero_only(print)(f"answers: {file}")

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let a signal end the run with a line that says how to resume it."""
        folder = self.run_folder.folder
        try:
            with self.signals:
                yield
        except OSError as error:
            error.filename = error.filename or str(folder)
            raise
        except Stopped as stop:
            if self.trainer.is_global_zero:
                last = " --ckpt_path last" if self.subcommand == "fit" else ""
                how = f"; resume with --run_dir {shlex.quote(str(folder))}{last}"
                print(f"stopped by {stop}{how if folder.exists() else ''}", file=sys.stderr)
            sys.exit(128 + stop.signum)
        finally:
            if self.run_folder.lock.is_locked:
                self.run_folder.lock.release(force=True)
                Path(self.run_folder.lock.lock_file).unlink(missing_ok=True)
            # A later run of this process makes a folder of its own.
            os.environ.pop(RUN_DIR_VARIABLE, None)

    def _prepare(self, fit: bool = False) -> None:
        """Show the plan, read the data, evaluate the models that the policy is compared with."""
        if self._ckpt_path is not None and not Path(self._ckpt_path).exists():
            raise UserError(f"--ckpt_path {self._ckpt_path} does not exist; a run keeps it as RUN_DIR/{LAST}")
        data, first = self.datamodule, self.trainer.is_global_zero
        # What is refused before the processes meet is refused in all: one alone would leave the others waiting.
        self.run_folder.check(fit, resume=self.resumes or self._ckpt_path is not None or not fit)
        if first and self.resumes and self._ckpt_path is None:
            print("no checkpoint yet: the run starts from its beginning")
        data.trainer = self.trainer
        # Some data modules make their models on first use.
        data.prepare_data()
        rank_zero_only(say)(plan(self.trainer, self.model, self.run_folder.folder, fit))
        if fit:
            if first and "retain" not in self.model.parts and self.model.objective.default_retain_weight:
                print("warning: there is no retain loss, so the model may lose everything else, too")
            answer = partial(self._evaluate_once, "answers", self.model)
            data.make_rows(self.model.parts, self.run_folder.folder, answer)
            # Mistakes in the training rows show before the first evaluation.
            data.load_training(self.model.parts)
            rank_zero_only(say)(memory(self.trainer, self.model, data))
        if data.eval.depth:
            check_depth(data.eval.retrained, self.model.name if fit else None)
        data.setup("validate")
        self._evaluate_references()
        if first:
            measured = (generates if self.subcommand == "predict" else measures)(data.evaluation())
            say("\n".join([*([data.describe()] if fit else []), measured]))

    def _evaluate_references(self) -> None:
        data, options = self.datamodule, self.datamodule.eval
        if options.mia_reference is not None:
            splits = [split for split in data.evaluation().splits if split.scores]
            if not splits:
                raise UserError(
                    "--eval.mia_reference: no attack is made here; measure forget and holdout rows, or leave it out"
                )
            answers = AnswerLosses(splits, options)
            model = self.model.like(options.mia_reference, "--eval.mia_reference")
            result = self._evaluate_once("mia_reference", model, answers)
            data.use_reference_losses(answers.losses(result))
        if options.retrained is not None:
            model = self.model.like(options.retrained, "--eval.retrained")
            data.use_retrained_rows(self._evaluate_once("retrained", model).rows, options.retrained)

    def _evaluate_once(self, role: str, model: PolicyModule, data: pl.LightningDataModule | None = None) -> EvalResult:
        """Evaluate a model that does not change; batches may come from an earlier run, see `RunFolder.setup`."""
        self.run_folder.role = role
        self.trainer.validate(model, datamodule=data or self.datamodule, verbose=False)
        self.run_folder.role = "final"
        return result_of(model)

    def _final_result(self) -> EvalResult:
        """Evaluation of the exported model: that of its epoch if its weights are the same, else a new one."""
        newest = self.run_folder.result if self.run_folder.result_step == self.trainer.global_step else None
        result = newest if self.export.options.best is None else self.export.result
        if result is None or self.model.lora is not None:
            # Merging an adapter rounds.
            result = self._evaluate_once("final", self.model.like(str(self.export.folder)))
        return result

    def _depth(self) -> Any:
        """Unlearning Depth Score of the exported model, see `measure_depth`."""
        self.run_folder.role, retrained = "depth", self.datamodule.eval.retrained
        models = (self.model.name, retrained, str(self.export.folder))
        try:
            return measure_depth(self.trainer, self.model, self.datamodule, *models)
        except Exception as error:
            # Such as a lack of memory: the run ends with its other results, and `check` can measure it later.
            self.run_folder.record["unavailable"][UDS] = reason = f"it could not be measured ({error!r:.300})"
            rank_zero_warn(f"--eval.depth: {reason}")
            return None

    def _finish(self, result: EvalResult | None, epoch: int | None = None, depth: Any = None) -> None:
        """Write the results, show table and files."""
        self.run_folder.finish(self.trainer, self.datamodule, result, epoch, depth)
        if self.trainer.is_global_zero:
            show(self.run_folder.record)
            board = any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers)
            say(written(self.run_folder.folder, board))

    # -- settings ------------------------------------------------------------------------------------------

    @property
    def _ckpt_path(self) -> str | None:
        return self.config[self.subcommand].ckpt_path

    def _folder(self, config: Any) -> Path:
        """The run's folder; processes that this one starts find its name in the environment."""
        named = config.run_dir or os.environ.get(RUN_DIR_VARIABLE)
        if named is None:
            objective = config.model.objective
            name = "SimNPO" if objective is None else objective["class_path"].rsplit(".", 1)[-1]
            # To the millisecond: runs that a shell starts at once are different ones.
            now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
            named = f"runs/{now}_{self.subcommand}_{name}"
            os.environ[RUN_DIR_VARIABLE] = named
        return Path(named).expanduser()

    def _resolved(self, config: Any) -> str:
        shown = config.clone()
        shown.pop("config", None)
        shown.run_dir = shown.ckpt_path = None
        # LightningCLI gives the subcommand's parser to its own SaveConfigCallback only.
        return self._parser(self.subcommand).dump(shown, skip_none=False, skip_link_targets=True)


def result_of(model: PolicyModule) -> EvalResult:
    if model.evaluation_result is None:
        limits = "--trainer.limit_val_batches and limit_test_batches"
        raise UserError(f"{model.name} was not evaluated: leave {limits} above 0")
    return model.evaluation_result


def _as_list(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [] if given is None else [given]


def precision(trainer: Any) -> Any:
    """Precision of the Trainer with these settings: bfloat16 if none is named and the GPU computes in it."""
    on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if trainer["precision"] is None and bfloat16 else trainer["precision"]
