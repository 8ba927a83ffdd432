"""Options of the commands, apart from their modules: mistakes and `--help` are answered before torch is imported."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path

Add = Callable[..., object]
"""`ArgumentParser.add_argument`."""


def number(
    kind: type[int] | type[float], *, least: float = -inf, above: float = -inf, most: float = inf
) -> Callable[[str], float]:
    """Type of a finite number within bounds."""
    named = {"at least": least, "above": above, "at most": most}
    bounds = " and ".join(f"{words} {bound}" for words, bound in named.items() if isfinite(bound))

    def read(text: str) -> float:
        value = kind(text)
        if not (isfinite(value) and value > above and least <= value <= most):
            raise ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    read.__name__ = "whole number" if kind is int else "number"
    return read


at_least_1 = number(int, least=1)
at_least_0 = number(int, least=0)
above_0 = number(float, above=0)


def path(text: str) -> Path:
    """Type of a file or folder, with `~` as the home folder."""
    return Path(text).expanduser()


def bits(text: str) -> int | str:
    """Type of a number of bits or a named format."""
    return int(text) if text.isdigit() else text


def names(text: str) -> list[str]:
    """Type of names joined by commas."""
    return [name for name in text.replace(" ", "").split(",") if name]


def shard(text: str) -> slice:
    """Type of a worker's share, such as 0/8: every 8th run, from the first."""
    first, _, workers = text.partition("/")
    if not (first.isdigit() and workers.isdigit() and int(first) < int(workers)):
        raise ArgumentTypeError(f"must be I/N with I from 0 to N - 1, such as 0/8, got {text}")
    return slice(int(first), None, int(workers))


def doctor(add: Add) -> None:
    add("configs", nargs="*", type=path, metavar="CONFIG", help="instead of configs/*.yaml")
    add("--timeout", type=above_0, default=3.0, help="wait for the hub, seconds")


def _planned(add: Add, kind: str) -> None:
    """A plan file, its runs and their table."""
    add("files", nargs="+", type=path, metavar="FILE", help=f"{kind} file, and files that change it")
    add("-o", "--out", type=path, metavar="FILE", help="Markdown file for the table")
    add("--folder", help="where the runs go, instead of the file's")
    add("--table", action="store_true", help="only the table of what is finished")


def _attacked(add: Add, control: bool = True) -> None:
    """What is attacked, and the control beside it."""
    what = "folders of finished runs, or with --config models: hub ids or folders, before all other options"
    add("runs", nargs="+", type=path, metavar="RUN", help=what)
    what = "config, and further options of test, by which models are evaluated before they are attacked; for a run, "
    what += "the places of its data (such as --data.path), --trainer options and --model.dtype alone are taken"
    add("--config", action="append", default=[], metavar="FILE", help=what)
    add("--out", type=path, default=Path("runs/check"), metavar="FOLDER", help="of the evaluations of models")
    if control:
        add("--retrained", metavar="MODEL", help="retrained model, the control; by default the run's --eval.retrained")


def check(add: Add) -> None:
    _attacked(add)
    add("--attacks", nargs="+", choices=("relearn", "quantize", "leak", "depth"), help="only these attacks")
    add("--start", metavar="MODEL", help="start model, for depth; by default that of a run of fit")
    add("--epochs", type=at_least_1, default=5, help="of relearning")
    add("--text", metavar="FILE", help="text to relearn with, such as a page of general text")
    add("--k", type=at_least_1, default=8, help="answers drawn for each prompt")
    add("--seed", type=at_least_0, default=0, help="of all draws")


def leak(add: Add) -> None:
    _attacked(add)
    add("--k", type=at_least_1, default=16, help="answers drawn for each prompt")
    add("--temperature", type=above_0, default=1.0, help="of the softmax; greedy answers: predict")
    add("--seed", type=at_least_0, default=0, help="of all draws")
    what = "ROUGE-L recall from which an answer is right; by default 0.8, with --entailment 0.1"
    add("--correct", type=number(float, least=0, most=1), metavar="RECALL", help=what)
    add("--entailment", metavar="MODEL", help="classifier that must find that an answer entails the true one")
    add("--entailment_label", default="entailment", metavar="LABEL", help="its label of entailment")


def lm_eval(add: Add) -> None:
    add("runs", nargs="+", type=path, metavar="RUN", help="folders of finished runs")
    add("--tasks", required=True, type=names, help="the harness's tasks or groups, joined by commas: wmdp_bio,mmlu")
    add("--include_path", type=path, metavar="FOLDER", help="custom tasks, as the harness's YAML")
    add("--start", action="store_true", help="measure each run's start model, too")
    add("--num_fewshot", type=at_least_0, help="examples before a question, instead of the task's")
    add("--limit", type=at_least_1, help="only the first questions of each task, to try it")
    add("--batch_size", type=at_least_1, default=8, help="questions at a time")
    add("--device", metavar="NAME", help="such as cuda:0 or cpu, instead of a GPU if there is one")
    add("--dtype", default="auto", help="type of the weights; auto: that of the saved model")


def markov(add: Add) -> None:
    add("--out", type=path, default=Path("runs/markov"), metavar="FOLDER", help="folder of models and results")
    add("--setting", choices=("small", "paper"), default="small", help="size of the study")
    add("--seeds", type=at_least_0, nargs="+", default=[0, 1, 2, 3], help="a run of each method for each")
    add("--processes", type=at_least_1, default=2, help="parallel processes")


def perturb(add: Add) -> None:
    add("model", metavar="MODEL", help="hub id or folder")
    add("--share", type=number(float, least=0, most=1), default=0.5, help="of the random model's weights, 0 to 1")
    add("--seed", type=at_least_0, default=0, help="of the random weights")
    add("--out", required=True, type=path, metavar="FOLDER", help="new folder of the model")


def quantize(add: Add) -> None:
    _attacked(add, control=False)
    add("--bits", nargs="+", type=bits, choices=(8, 4, "nf4"), default=(8, 4), help="bits of a weight")
    add("--group_size", type=at_least_1, default=32, help="weights that share a scale at 4 bits")


def relearn(add: Add) -> None:
    subsets = ("shortest", "random", "retain")
    _attacked(add)
    what = "rows to relearn: forget rows with the shortest answers, in tokens, a random draw of them, or retain rows"
    add("--subset", nargs="+", choices=subsets, default=subsets[:2], help=what)
    add("--text", metavar="FILE", help="text to relearn with, too: blocks as long as the longest forget row")
    what = "number of rows, as a part of the forget rows"
    add("--share", type=number(float, above=0, most=1), default=0.2, help=what)
    add("--epochs", type=at_least_1, default=3, help="passes over these rows")
    add("--lr", nargs="+", type=above_0, help="learning rates at the start, an attack each; by default the run's own")
    add("--repeats", type=at_least_1, default=5, help="random draws")
    add("--seed", type=at_least_0, default=0, help="seed of the first draw")


def report(add: Add) -> None:
    what = "files to write, by their endings: .html, .md (figures go to a folder next to it), .tex; a name without an "
    what += "ending is a folder for the figures as PDF; instead of report.html in the folder of a single run, else in "
    what += "the current folder"
    add("runs", nargs="*", type=path, metavar="RUN", help="run folders, instead of the newest run in runs/")
    add("-o", "--out", nargs="+", type=path, metavar="FILE", help=what)
    add("--label", nargs="+", default=[], metavar="NAME", help="names of the runs, instead of those that fit gave them")
    add("--columns", nargs="+", metavar="METRIC", help="metrics of the tables, such as forget_quality, instead of all")


def sweep(add: Add) -> None:
    _planned(add, "sweep")
    add("--figure", type=path, metavar="FILE", help="PNG file for a figure: a panel for each metric, over the methods")
    add("--shard", type=shard, default="0/1", metavar="I/N", help="only every Nth run, from the Ith, counted from 0")
    add("--list", action="store_true", help="only print the command of every run")


def task_vector(add: Add) -> None:
    add("--start", required=True, metavar="MODEL", help="start model: hub id or folder")
    add("--overfit", required=True, metavar="MODEL", help="start model fine-tuned on the forget rows")
    add("--alpha", type=number(float, least=0), default=1.0, help="length of the step")
    add("--out", required=True, type=path, metavar="FOLDER", help="new folder of the model")


def tune(add: Add) -> None:
    _planned(add, "tuning")
    add("--methods", nargs="+", metavar="NAME", help="only these methods")


def verify(add: Add) -> None:
    _planned(add, "verification")
    add("--checkpoints", nargs="+", metavar="NAME", help="only these checkpoints")


def weights(add: Add) -> None:
    add("runs", nargs="+", type=path, metavar="RUN", help="folders of runs of fit, one a method")
    add("--epochs", nargs="+", type=int, default=[1, 2, 3, 10], help="epochs to show, if a run has them")
    add("--out", required=True, type=path, metavar="FOLDER", help="folder of the figures")
