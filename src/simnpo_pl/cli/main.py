"""The command line: LightningCLI with the order of a whole run (start, train, final evaluation) and its folder."""

import logging
import os
import sys
import time
import warnings
from argparse import ArgumentError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import simnpo_pl.benchmarks  # noqa: F401  (its classes are known by their short names once imported)
from simnpo_pl.benchmarks.paired import PairedData
from simnpo_pl.cli.arguments import RUN_OPTIONS, TRAINER_DEFAULTS, clear_changed_classes, plain, unknown_class
from simnpo_pl.cli.summary import measures, memory, plan, table, written
from simnpo_pl.evaluation.cache import evaluate_once
from simnpo_pl.evaluation.evaluation import EvalResult
from simnpo_pl.evaluation.losses import AnswerLosses
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.tags import tag
from simnpo_pl.models.loading import trust_remote_code
from simnpo_pl.module.policy import PolicyModule, check_trainer
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import Objective
from simnpo_pl.objectives.retain import RetainLoss
from simnpo_pl.runs.checkpoint import LAST, CheckpointOptions, SaveState
from simnpo_pl.runs.checkpoints import AtomicCheckpointIO
from simnpo_pl.runs.export import ExportModel, ExportOptions
from simnpo_pl.runs.folder import PREDICTIONS, RunFolder
from simnpo_pl.runs.history import History
from simnpo_pl.runs.progress import ProgressBar
from simnpo_pl.runs.stopping import Stopped, StopSignals
from simnpo_pl.runs.weights import GradientWeights
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import recover

RUN_DIR_VARIABLE = "SIMNPO_PL_RUN_DIR"
CLASSES: dict[str, type[Any]] = {"model.objective": Objective, "model.retain_loss": RetainLoss, "data": PairedData}
"""Options that name a class, and what it is a kind of."""


class UnlearningCLI(LightningCLI):
    """`fit` evaluates the start model, unlearns, exports and evaluates; `validate`, `test`, `predict` only evaluate."""

    resumes = False
    """Whether the run goes on with what its folder holds."""

    def __init__(self, args: list[str] | None = None) -> None:
        self.signals = StopSignals()
        super().__init__(
            UnlearningModule,
            PairedData,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
            parser_kwargs={"exit_on_error": False},
            trainer_defaults=dict(TRAINER_DEFAULTS),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own options and what they are linked to."""
        for name, kind in (("run_dir", str | None), ("trust_remote_code", bool)):
            _, default, text = RUN_OPTIONS[name]
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        parser.add_class_arguments(EvalOptions, "eval", instantiate=True)
        parser.add_class_arguments(ExportOptions, "export", instantiate=True)
        parser.add_class_arguments(CheckpointOptions, "checkpoint", instantiate=True)
        parser.link_arguments("model.name", "data.init_args.model")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("eval", "data.init_args.eval", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; the name of an unknown class is answered with the known ones.

        Raises:
            UserError: There is no such class or setting, a value is none of its kind, or the seed makes no sense.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(unknown_class(str(error), CLASSES) or plain(str(error))) from error
        seed = self.config[self.config["subcommand"]].seed_everything
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything must be a whole number from 0 to {2**32 - 1}, got {seed}")

    def before_instantiate_classes(self) -> None:
        """Our table takes the place of Lightning's; the last checkpoint is the run folder's."""
        config = self.config[self.subcommand]
        trust_remote_code(config.trust_remote_code)
        if "verbose" in config:
            config.verbose = False
        if config.trainer.precision == "bf16-true":
            # Weights in bfloat16 are what is meant; Lightning would cast buffers, too.
            config.model.dtype, config.trainer.precision = "bfloat16", "32-true"
        if config.ckpt_path == "last":
            if config.run_dir is None:
                raise UserError("--ckpt_path last needs --run_dir FOLDER, the run to go on with")
            last = Path(config.run_dir).expanduser() / LAST
            recover(last)
            self.resumes = True
            config.ckpt_path = str(last) if last.exists() else None

    def _parse_ckpt_path(self) -> None:
        """Flags and config stand; a checkpoint brings weights and training state only."""

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Trainer with our callbacks and, unless another is named, a TensorBoard logger in the run's folder."""
        config = self.config[self.subcommand]
        folder = self._folder(config)
        given = self._get(self.config_init, "trainer")
        if str(given["strategy"]).startswith("deepspeed") and find_spec("deepspeed") is None:
            raise UserError(
                f"--trainer.strategy {given['strategy']} needs DeepSpeed: pip install 'simnpo_pl[deepspeed]', or take "
                "--config configs/hardware/fsdp.yaml, which shares models out with PyTorch alone"
            )
        if given["logger"] in (None, True):
            kwargs["logger"] = TensorBoardLogger(str(folder), name="", version="")
        kwargs["precision"] = precision(given)
        self.run_folder = RunFolder(folder, self._resolved(config), self._settings(config), int(config.seed_everything))
        own = given["callbacks"] or []
        callbacks: list[Any] = [*(own if isinstance(own, list) else [own]), self.run_folder]
        if given["enable_progress_bar"] is not False and not any(isinstance(c, AnyProgressBar) for c in callbacks):
            callbacks.append(ProgressBar())
        if self.subcommand == "fit":
            self.export = ExportModel(folder / "model", self._get(self.config_init, "export"))
            callbacks += [
                self.export,
                History(folder),
                GradientWeights(folder),
            ]
            if given["logger"] is not False:
                callbacks.append(LearningRateMonitor("step"))
        # The last of all, so that what the others keep is in the state that is saved.
        callbacks.append(
            SaveState(folder, self._get(self.config_init, "checkpoint", CheckpointOptions()), self.signals)
        )
        if isinstance(given["strategy"], str) and not given["strategy"].startswith(("fsdp", "deepspeed")):
            plugins = given["plugins"] or []
            kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks)
        check_trainer(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; a signal ends the run with the line that goes on with it."""
        try:
            with self.signals:
                super()._run_subcommand(subcommand)
        except OSError as error:
            error.filename = error.filename or str(self.run_folder.folder)
            raise
        except Stopped as stop:
            if self.trainer.is_global_zero:
                folder = self.run_folder.folder
                how = f"go on with --run_dir {folder}{' --ckpt_path last' if subcommand == 'fit' else ''}"
                print(f"stopped by {stop}; {how}" if folder.exists() else f"stopped by {stop}", file=sys.stderr)
            sys.exit(128 + stop.signum)

    # -- the order of a run ------------------------------------------------------------------------------

    def before_fit(self) -> None:
        """Evaluate the retrained model, where one is named, and the start model."""
        self._open(fit=True)
        self.export.check(self.trainer, self.model, self.datamodule.evaluation())
        if self._ckpt_path is None and self.datamodule.eval.start:
            self._evaluate_once("start", self.model)

    def after_fit(self) -> None:
        """Evaluate the exported model, unless its epoch was, and print what came of it."""
        if not self.export.is_there:
            # A run that was stopped after its last epoch has nothing left to train when it goes on.
            self.export.save_last(self.trainer, self.model)
        result = self._final_result() if self.datamodule.eval.final else None
        self.run_folder.finish(self.trainer, self.datamodule, result, self.export.epoch)
        self._report()

    def _final_result(self) -> EvalResult:
        """Evaluation of the exported model, made now unless an epoch's evaluation was of the same weights."""
        newest = self.run_folder.result if self.run_folder.result_step == self.trainer.global_step else None
        result = newest if self.export.options.best is None else self.export.result
        if result is None or self.model.lora is not None:
            # An adapter is evaluated as it was exported: merging it rounds.
            model = self.model.like(str(self.export.folder))
            model.logs_metrics = True
            self.run_folder.role, self.run_folder.result = "final", None
            self.trainer.test(model, datamodule=self.datamodule, verbose=False)
            result = self._measured()
        return result

    def _measured(self) -> EvalResult:
        if self.run_folder.result is None:
            raise UserError("nothing was evaluated: leave --trainer.limit_val_batches and limit_test_batches above 0")
        return self.run_folder.result

    def before_validate(self) -> None:
        """Evaluate the retrained model where one is named."""
        self._open()

    def after_validate(self) -> None:
        """Write and print the results."""
        self.run_folder.finish(self.trainer, self.datamodule, self._measured(), None)
        self._report()

    before_test = before_validate
    after_test = after_validate

    def before_predict(self) -> None:
        """See that no answers are written over; they are compared with nothing."""
        if (self.run_folder.folder / PREDICTIONS).exists():
            raise UserError(f"--run_dir {self.run_folder.folder} holds {PREDICTIONS}; give another folder")
        options = self.datamodule.eval
        if options.generate_rows == 0:
            raise UserError("predict writes generated answers: leave --eval.generate_rows above 0, or null for all")
        options.retain_log = options.retrained = options.mia_reference = None
        self._open()

    def after_predict(self) -> None:
        """Say where the answers are."""
        if self.trainer.is_global_zero:
            print(f"answers: {self.run_folder.folder / PREDICTIONS}")

    @property
    def _ckpt_path(self) -> str | None:
        return self.config[self.subcommand].get("ckpt_path")

    def _open(self, fit: bool = False) -> None:
        if self._ckpt_path is not None and not Path(self._ckpt_path).exists():
            raise UserError(f"--ckpt_path {self._ckpt_path} does not exist; a run keeps it as RUN_DIR/last.ckpt")
        if self.trainer.is_global_zero:
            self.run_folder.check(resume=self.resumes or self._ckpt_path is not None or not fit)
            if self.resumes and self._ckpt_path is None:
                print("no checkpoint yet: the run starts from its beginning")
        self.datamodule.trainer = self.trainer
        # Some data modules make their models on first use.
        self.datamodule.prepare_data()
        if self.trainer.is_global_zero:
            print(plan(self.trainer, self.model, self.run_folder.folder, fit))
        if fit:
            # Whatever is wrong with the training rows shows before the first evaluation.
            self.datamodule.parts = self.model.parts
            self.datamodule.setup("fit")
            if self.trainer.is_global_zero:
                print(memory(self.trainer, self.model, self.datamodule), flush=True)
        name = self.datamodule.eval.mia_reference
        if name is not None:
            self.datamodule.setup("validate")
            sets = [part for part in self.datamodule.evaluation().sets if part.scores]
            if not sets:
                raise UserError(
                    "--eval.mia_reference: no attack is made here; measure forget and holdout rows, or leave it out"
                )
            answers = AnswerLosses(sets, self.datamodule.eval, self.datamodule.pad_id)
            result = self._evaluate_once("mia_reference", self.model.like(name, "--eval.mia_reference"), answers)
            self.datamodule.use_reference_losses(answers.losses(result))
        name = self.datamodule.eval.retrained
        if name is not None:
            model = self.model.like(name, "--eval.retrained")
            self.datamodule.use_retrained_rows(self._evaluate_once("retrained", model).rows, name)
        if self.trainer.is_global_zero:
            if fit:
                print(self.datamodule.describe())
            self.datamodule.setup("validate")
            print(measures(self.datamodule.evaluation()))

    def _evaluate_once(self, role: str, model: PolicyModule, losses: AnswerLosses | None = None) -> EvalResult:
        """Evaluate a model that does not change, or take up the result that an earlier run kept.

        Args:
            role: Which model it is, such as start.
            model: The model.
            losses: What is measured of it, where that is less than everything.
        """
        self.run_folder.role = role
        result, kept = evaluate_once(self.trainer, model, losses or self.datamodule)
        if kept:
            self.run_folder.take(self.trainer, result)
            if model.logs_metrics and self.trainer.logger is not None:
                self.trainer.logger.log_metrics({tag(name): value for name, value in result.values.items()}, step=0)
        self.run_folder.role = "final"
        return result

    def _report(self) -> None:
        if self.trainer.is_global_zero:
            print(table(self.run_folder.record))
            board = any(isinstance(logger, TensorBoardLogger) for logger in self.trainer.loggers)
            print(written(self.run_folder.folder, board))

    # -- names -------------------------------------------------------------------------------------------

    def _folder(self, config: Any) -> Path:
        """The run's folder; processes that this one starts find its name in the environment."""
        named = config.run_dir or os.environ.get(RUN_DIR_VARIABLE)
        if named is None:
            objective = _short_name(config.model.objective)
            named = f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_{self.subcommand}_{objective}"
            os.environ[RUN_DIR_VARIABLE] = named
        return Path(named).expanduser()

    def _resolved(self, config: Any) -> str:
        shown = config.clone()
        shown.pop("config", None)
        shown.run_dir = None
        shown.ckpt_path = None
        return self._parser(self.subcommand).dump(shown, skip_none=False, skip_link_targets=True)

    def _settings(self, config: Any) -> dict[str, Any]:
        model = config.model.clone().as_dict()
        return {"model": model, "data": config.data.clone().as_dict(), "eval": config.eval.clone().as_dict()}


def precision(trainer: Any) -> Any:
    """Precision of the Trainer with these settings: bfloat16 where none is named and the GPU computes in it."""
    on_gpu = trainer["accelerator"] in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    bfloat16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if trainer["precision"] is None and bfloat16 else trainer["precision"]


def _short_name(objective: Any) -> str:
    return "SimNPO" if objective is None else objective["class_path"].rsplit(".", 1)[-1]


def run(arguments: list[str]) -> None:
    """Run the command line with these arguments."""
    quiet()
    UnlearningCLI(clear_changed_classes(arguments))


def quiet() -> None:
    """Leave out messages that advertise or repeat what the plan says."""
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*predict returned None.*")
    # A process may have had no row of a small split; the others have.
    warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
