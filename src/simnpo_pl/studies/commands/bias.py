"""The SimNPO paper's analysis of reference-model bias: the runs of a study, its tables and figures.

    python -m simnpo_pl bias configs/analysis/bias_demo.yaml --out runs/bias

Parts: weights (figures 2 and 3), perturbation (figure A1), memorization (table A2), ablation (figure A2). Finished runs
are skipped, so an interrupted call can be repeated. All options but these are those of `fit`, for every run, such as
--data.path FOLDER.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from simnpo_pl.utils.errors import UserError

if TYPE_CHECKING:
    from simnpo_pl.runs.record import Run
    from simnpo_pl.studies.analysis.halves import Half
    from simnpo_pl.studies.analysis.study import Ablation, Memorization, Perturbation, Runner

TAKES_FIT_OPTIONS = True
PARTS = ("weights", "perturbation", "memorization", "ablation")


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "study", type=Path, metavar="STUDY", help="what to run, such as configs/analysis/bias_demo.yaml"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder of the runs and tables")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="folder of the figures (default: OUT/figures)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to do (default: all the study has)"
    )


def run(options: Namespace) -> None:
    """Make the runs that are missing, print the tables, draw the figures.

    Raises:
        UserError: The study makes no sense, a run failed, or the libraries are not installed.
    """
    from simnpo_pl.studies.analysis import tables
    from simnpo_pl.studies.analysis.figures import check_installed
    from simnpo_pl.studies.analysis.study import Runner, read_study
    from simnpo_pl.studies.commands.weights import describe
    from simnpo_pl.utils.files import write_text

    check_installed()
    study, out = read_study(options.study), options.out.expanduser()
    figures = (options.figures or out / "figures").expanduser()
    prefix = options.study.stem
    runner = Runner(study, out, options.fit)
    runs = {name: runner.run(name, words) for name, words in study.methods.items()}
    first = next(iter(runs.values()))
    known = [(model, first, model) for model in ("start", "retrained") if first.metrics(model)]
    parts = [f"# {prefix}", tables.models([*known, *((name, run, "final") for name, run in runs.items())])]
    if "weights" in options.parts:
        parts += describe(list(runs.values()), study.epochs, figures, prefix)
    if "perturbation" in options.parts and study.perturbation is not None:
        parts += _perturbation(runner, study.perturbation, runs)
    if "memorization" in options.parts and study.memorization is not None:
        parts += _memorization(runner, study.memorization, first, figures / f"{prefix}_memorization.png")
    if "ablation" in options.parts and study.ablation is not None:
        parts += _ablation(runner, study.ablation, figures / f"{prefix}_ablation.png")
    text = "\n\n".join(parts) + "\n"
    write_text(out / "bias.md", text)
    print(text)


def _perturbation(runner: "Runner", wanted: "Perturbation", runs: "dict[str, Run]") -> list[str]:
    """A method whose reference is averaged with a random model."""
    from simnpo_pl.studies.analysis import tables
    from simnpo_pl.studies.arithmetic import perturb

    own = runs[wanted.method]
    folder = runner.out / f"reference-share{wanted.share:g}-seed{wanted.seed}"
    if not folder.is_dir():
        perturb(_start(own), wanted.share, wanted.seed, folder)
    name = f"{wanted.method}-perturbed"
    perturbed = runner.run(name, runner.study.methods[wanted.method], ["--model.reference", str(folder)])
    table = tables.models([(wanted.method, own, "final"), (name, perturbed, "final")])
    return [f"## Reference with a share of {wanted.share:g} of a random model", table]


def _memorization(runner: "Runner", wanted: "Memorization", known: "Run", file: Path) -> list[str]:
    """All rows unlearned from a model that was fine-tuned on the first half of them only."""
    from simnpo_pl.studies.analysis import tables
    from simnpo_pl.studies.analysis.figures import START, truth_ratios_of_halves
    from simnpo_pl.studies.analysis.halves import by_order, qualities
    from simnpo_pl.studies.arithmetic import perturb

    base = wanted.base
    if base is None:
        folder = runner.out / "untrained"
        if not folder.is_dir():
            perturb(_start(known), 1.0, known.record["seed"], folder)
        base = str(folder)
    start = runner.run("half-start", wanted.fit, ["--model.name", base])
    found: dict[str, list[Half]] = {}
    rows = []
    for method, words in runner.study.methods.items():
        run = runner.run(f"half-{method}", words, ["--model.name", str(start.folder / "model")])
        halves = by_order(run.record["counts"]["forget/truth_ratio"])
        if not found:
            found[START] = qualities(run.start_rows, run.retrained_rows, halves)
            rows.append((START, run, "start"))
        found[method] = qualities(run.rows, run.retrained_rows, halves)
        rows.append((method, run, "final"))
    truth_ratios_of_halves(found, file)
    title = "## Strongly and weakly memorised halves: the start model saw the first half of the forget rows only"
    return [title, tables.halves(found), tables.models(rows), f"figure: {file}"]


def _ablation(runner: "Runner", wanted: "Ablation", file: Path) -> list[str]:
    """Forget quality and model utility over beta and gamma."""
    from simnpo_pl.report.words import number
    from simnpo_pl.studies.analysis.figures import heat_maps
    from simnpo_pl.utils.markdown import table

    metrics = {"forget_quality": "forget quality", "model_utility": "model utility"}
    maps: dict[str, list[list[float]]] = {title: [] for title in metrics.values()}
    lines = []
    for gamma in wanted.gamma:
        cells: dict[str, list[float]] = {title: [] for title in metrics.values()}
        for beta in wanted.beta:
            values = ["--model.objective.beta", f"{beta:g}", "--model.objective.gamma", f"{gamma:g}"]
            own = f"{runner.study.methods[wanted.method]} {wanted.fit}"
            run = runner.run(f"{wanted.method}-beta{beta:g}-gamma{gamma:g}", own, values)
            final = run.metrics("final")
            for key, title in metrics.items():
                if key not in final:
                    raise UserError(
                        f"{run.folder} has no {title}: give the study --eval.retrained and generated answers"
                    )
                cells[title].append(final[key])
            shown = (*metrics, "forget/probability", "retain/probability")
            lines.append([f"{beta:g}", f"{gamma:g}", *(number(final[key]) for key in shown)])
        for title, line in cells.items():
            maps[title].append(line)
    heat_maps(wanted.beta, wanted.gamma, maps, wanted.method, file)
    heads = ["beta", "gamma", *metrics.values(), "forget prob.", "retain prob."]
    return [f"## {wanted.method} over beta and gamma", table(heads, lines), f"figure: {file}"]


def _start(run: "Run") -> str:
    """The start model of a run."""
    name = run.record["settings"]["model"]["name"]
    if not isinstance(name, str):
        raise UserError(f"{run.folder} does not say which model it started from")
    return name
