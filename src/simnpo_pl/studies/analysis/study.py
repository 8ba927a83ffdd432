"""Runs of an analysis: each a call of `fit` with the study's options, made once and skipped when it is finished."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from simnpo_pl.runs.record import Run, read_runs
from simnpo_pl.studies.launch import fit_once
from simnpo_pl.utils.errors import UserError


@dataclass(frozen=True)
class Perturbation:
    """A method with a perturbed reference (SimNPO paper, figure A1).

    Args:
        method: Which of the study's methods.
        share: Share of a random model in the average of the weights, 0 to 1.
        seed: Of the random model; not one that the start model's own first weights were drawn with.
    """

    method: str
    share: float = 0.5
    seed: int = 1


@dataclass(frozen=True)
class Memorization:
    """Start model that saw the first half of the forget rows only (SimNPO paper, table A2).

    Args:
        fit: Options of its fine-tuning, after the study's; `--data.train_split` names that half and the retain rows.
        base: Model that is fine-tuned; null takes one of the start model's architecture with fresh random weights.
    """

    fit: str
    base: str | None = None


@dataclass(frozen=True)
class Ablation:
    """Grid over beta and gamma (SimNPO paper, figure A2).

    Args:
        method: Which of the study's methods.
        beta: Values of beta.
        gamma: Values of gamma.
        fit: Options of these runs, after the method's.
    """

    method: str
    beta: list[float]
    gamma: list[float]
    fit: str = ""

    def __post_init__(self) -> None:
        if not (self.beta and self.gamma):
            raise UserError("an ablation needs values of beta and of gamma")


@dataclass(frozen=True)
class Study:
    """Content of a file such as configs/analysis/bias_demo.yaml; options are written as on a command line.

    Args:
        fit: Options of every run.
        methods: Name of a method to its options, which come after these.
        epochs: Epochs of which the gradient weights are shown.
        perturbation: Null for none.
        memorization: Null for none.
        ablation: Null for none.
    """

    fit: str
    methods: dict[str, str]
    epochs: list[int] = field(default_factory=lambda: [1, 2, 3, 10])
    perturbation: Perturbation | None = None
    memorization: Memorization | None = None
    ablation: Ablation | None = None

    def __post_init__(self) -> None:
        if not (self.methods and self.epochs):
            raise UserError("a study needs methods, and epochs to show")
        for part in (self.perturbation, self.ablation):
            if part is not None and part.method not in self.methods:
                raise UserError(f"{part.method} is no method of the study; it has {', '.join(self.methods)}")


def read_study(file: Path) -> Study:
    """The study in a file.

    Raises:
        UserError: The file is missing or holds something else.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study", instantiate=True)
    try:
        content = yaml.safe_load(file.expanduser().read_text())
        return parser.instantiate(parser.parse_object({"study": content})).study
    except OSError as error:
        raise UserError(f"cannot read the study {file} ({error.strerror}): name one of configs/analysis") from error
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{file} is no study ({reason}); configs/analysis/bias_demo.yaml shows one") from error


class Runner:
    """Makes the runs of a study under one folder.

    Args:
        study: What they have in common.
        out: Folder of the runs; each lies under its name.
        options: Further options of every `fit`, such as `--data.path FOLDER`.
    """

    def __init__(self, study: Study, out: Path, options: Sequence[str] = ()) -> None:
        self.study = study
        self.out = out
        self.options = list(options)

    def run(self, name: str, own: str = "", more: Sequence[str] = ()) -> Run:
        """A finished run; made now, or gone on with, unless it is there.

        Args:
            name: Of the run's folder.
            own: Options of this run, after those of the study, such as a method's.
            more: Options of this run that come last.

        Raises:
            UserError: The run failed, or its folder holds one with other options.
        """
        folder = self.out / name
        options = [*shlex.split(self.study.fit), *shlex.split(own), *self.options, *more]
        options += ["--trainer.enable_progress_bar", "false"]
        print(f"run {name}", flush=True)
        fit_once(folder, options, self.out, self.out / "logs" / f"{name}.txt")
        return read_runs([folder])[0]
