"""The SimNPO paper's analysis of reference-model bias: the runs of a study, its tables and figures.

    python -m simnpo_pl bias configs/analysis/bias_demo.yaml --out runs/bias

Parts: weights (figures 2 and 3), perturbation (figure A1), memorization (table A2), ablation (figure A2). Finished runs
are skipped, so an interrupted call can be repeated. All other options are those of `fit`, for every run, such as
--data.path FOLDER.
"""

import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from simnpo_pl.metrics import titles
from simnpo_pl.report.drawing import check_installed, panels
from simnpo_pl.runs.record import Run, read_runs
from simnpo_pl.studies import halves, weights
from simnpo_pl.studies.launch import fit_once
from simnpo_pl.studies.plans import read_plan
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_text

EXAMPLE = "configs/analysis/bias_demo.yaml"
QUALITY = ("forget_quality", "forget_quality/ks_statistic", "model_utility", "forget/probability", "retain/probability")
GRID = ("forget_quality", "model_utility", "forget/probability", "retain/probability")


@dataclass(frozen=True)
class Perturbation:
    """A method whose reference is averaged with a random model (SimNPO paper, figure A1).

    `share` is the random model's, `seed` differs from the seed of the start model's first weights.
    """

    method: str
    share: float = 0.5
    seed: int = 1


@dataclass(frozen=True)
class Memorization:
    """A start model that saw only the first half of the forget rows (SimNPO paper, table A2).

    It is `base`, or a model of the start model's architecture with random weights, fine-tuned with the options `fit`;
    their `--data.train_split` names that half and the retain rows.
    """

    fit: str
    base: str | None = None


@dataclass(frozen=True)
class Ablation:
    """Grid over beta and gamma (SimNPO paper, figure A2); `fit` are options of these runs, after the method's."""

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
        epochs: Of which the gradient weights are shown.
        perturbation: One part; so are the next two.
        memorization: See the class.
        ablation: See the class.
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


@dataclass(frozen=True)
class Runner:
    """Makes the runs of a study under `out`, with these options of `fit`."""

    study: Study
    out: Path
    options: Sequence[str] = ()

    def run(self, name: str, own: str = "", more: Sequence[str] = ()) -> Run:
        """A finished run, made or resumed if it is not; its options are the study's, `own`, those of `fit`, `more`."""
        folder = self.out / name
        options = [*shlex.split(self.study.fit), *shlex.split(own), *self.options, *more]
        print(f"run {name}", flush=True)
        options += ["--trainer.enable_progress_bar", "false"]
        fit_once(folder, options, self.out, self.out / "logs" / f"{name}.txt")
        return read_runs([folder])[0]

    def perturbed(self, run: Run, share: float, seed: int, name: str) -> str:
        """The start model of a run averaged with a random one."""
        from simnpo_pl.studies.arithmetic import perturb

        folder = self.out / name
        if not folder.is_dir():
            perturb(run.start_model, share, seed, folder)
        return str(folder)


def run(options: Namespace) -> None:
    check_installed()
    study, out, prefix = read_plan([options.study], Study, EXAMPLE), options.out, options.study.stem
    figures = options.figures or out / "figures"
    runner = Runner(study, out, options.fit)
    runs = {name: runner.run(name, own) for name, own in study.methods.items()}
    first = next(iter(runs.values()))
    known = [(model, first, model) for model in ("start", "retrained") if first.metrics(model)]
    parts = [f"# {prefix}", _table([*known, *((name, run, "final") for name, run in runs.items())])]
    if "weights" in options.parts:
        parts += weights.describe(list(runs.values()), study.epochs, figures, prefix)
    if "perturbation" in options.parts and study.perturbation is not None:
        parts += _perturbation(runner, study.perturbation, runs)
    if "memorization" in options.parts and study.memorization is not None:
        parts += _memorization(runner, study.memorization, first, figures / f"{prefix}_memorization.png")
    if "ablation" in options.parts and study.ablation is not None:
        parts += _ablation(runner, study.ablation, figures / f"{prefix}_ablation.png")
    text = "\n\n".join(parts) + "\n"
    write_text(out / "bias.md", text)
    print(text)


def _table(models: Sequence[tuple[str, Run, str]]) -> str:
    """Forget quality and utility of models: the title of each, its run, and which of the run's models it is."""
    rows = [([title, titles.number(run.forget_rows)], run.metrics(model)) for title, run, model in models]
    return titles.table(["model", "n"], rows, QUALITY)


def _perturbation(runner: Runner, wanted: Perturbation, runs: dict[str, Run]) -> list[str]:
    method, share, seed = wanted.method, wanted.share, wanted.seed
    reference = runner.perturbed(runs[method], share, seed, f"reference-share{share:g}-seed{seed}")
    name = f"{method}-perturbed"
    run = runner.run(name, runner.study.methods[method], ["--model.reference", reference])
    table = _table([(method, runs[method], "final"), (name, run, "final")])
    return [f"## Reference with a share of {share:g} of a random model", table]


def _memorization(runner: Runner, wanted: Memorization, known: Run, file: Path) -> list[str]:
    base = wanted.base or runner.perturbed(known, 1.0, known.record["seed"], "untrained")
    start = runner.run("half-start", wanted.fit, ["--model.name", base])
    found: dict[str, list[halves.ForgetSubset]] = {}
    models = []
    for method, own in runner.study.methods.items():
        run = runner.run(f"half-{method}", own, ["--model.name", str(start.folder / "model")])
        rows = halves.by_order(run.record["counts"]["forget/truth_ratio"])
        if not found:
            found[halves.START] = halves.qualities(run.start_rows, run.retrained_rows, rows)
            models.append((halves.START, run, "start"))
        found[method] = halves.qualities(run.rows, run.retrained_rows, rows)
        models.append((method, run, "final"))
    halves.draw(found, file)
    title = "## Strongly and weakly memorized halves: the start model saw only the first half of the forget rows"
    return [title, halves.table(found), _table(models), f"figure: {file}"]


def _ablation(runner: Runner, wanted: Ablation, file: Path) -> list[str]:
    cells: dict[tuple[float, float], dict[str, float]] = {}
    for gamma, beta in product(wanted.gamma, wanted.beta):
        own = f"{runner.study.methods[wanted.method]} {wanted.fit}"
        values = ["--model.objective.beta", f"{beta:g}", "--model.objective.gamma", f"{gamma:g}"]
        run = runner.run(f"{wanted.method}-beta{beta:g}-gamma{gamma:g}", own, values)
        cells[gamma, beta] = run.metrics("final")
        for metric in GRID[:2]:
            if metric not in cells[gamma, beta]:
                title = titles.title_of(metric).short
                raise UserError(f"{run.folder} has no {title}: give the study --eval.retrained and generated answers")
    rows = [([f"{beta:g}", f"{gamma:g}"], found) for (gamma, beta), found in cells.items()]
    size = 0.62 * len(wanted.beta) + 1.0, 0.42 * len(wanted.gamma) + 0.9
    with panels(file, 1, 2, size) as (figure, axes):
        for axis, metric in zip(axes[0], GRID, strict=False):
            found = [[cells[gamma, beta][metric] for beta in wanted.beta] for gamma in wanted.gamma]
            axis.imshow(found, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
            for (y, x), value in np.ndenumerate(found):
                ink = "white" if value > 0.6 else "black"
                axis.text(x, y, titles.number(value), ha="center", va="center", fontsize=6.5, color=ink)
            axis.set_xticks(range(len(wanted.beta)), [f"{value:g}" for value in wanted.beta])
            axis.set_yticks(range(len(wanted.gamma)), [f"{value:g}" for value in wanted.gamma])
            axis.grid(False)
            axis.set_title(titles.title_of(metric).short)
            axis.set_xlabel(r"$\beta$")
        axes[0][0].set_ylabel(r"$\gamma$")
        figure.suptitle(wanted.method, fontsize=8)
    table = titles.table(["beta", "gamma"], rows, GRID)
    return [f"## {wanted.method} over beta and gamma", table, f"figure: {file}"]
