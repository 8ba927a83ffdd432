"""Commands over finished runs, and commands that make many runs: a module each, imported when its command is called.

A module has `run(options)`, and its docstring is the text of `--help`; the options are in options.py.
"""

import ast
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from simnpo_pl.studies import options
from simnpo_pl.utils.errors import UserError, nearest

COMMANDS = {
    "check": "does it come back? relearning, rounded weights and sampled answers of finished runs or other models",
    "doctor": "show versions, devices, whether the hub answers, and what configs need",
    "leak": "leak@k: sample answers of finished runs to the forget questions",
    "lm-eval": "accuracy of finished runs on lm-evaluation-harness's tasks, such as wmdp_bio and mmlu",
    "markov": "compare methods on mixtures of Markov chains, where the right answer is known",
    "perturb": "average a model's weights with random ones, for a perturbed reference",
    "quantize": "evaluate finished runs again after their weights were rounded to 8 and 4 bits",
    "relearn": "relearning attack on finished runs: fine-tune the unlearned model on part of what it forgot",
    "report": "write a page, Markdown or LaTeX rows over finished runs",
    "sweep": "a table of the paper: methods x splits x seeds, shared among workers",
    "task-vector": "unlearn without training: subtract what fine-tuning on the forget rows adds to the weights",
    "tune": "tune methods with Optuna: an equal number of trials for each, chosen by a stated rule",
    "verify": "score published checkpoints, and compare every metric with its published value",
    "weights": "gradient weights over finished runs, against answer length and difficulty: tables, figures",
}
"""Name of a command to what it does, in one line."""
MODULES = {"perturb": "studies.arithmetic", "report": "report.command", "task-vector": "studies.arithmetic"}
"""Module of a command whose module does not have its name."""
TAKE_FIT_OPTIONS = ("check", "leak", "quantize", "relearn", "sweep", "tune", "verify")
"""Commands whose unknown arguments are options of `fit` or `test`."""


class _Formatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    pass


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help lists the options")


def module_of(name: str) -> str:
    return f"simnpo_pl.{MODULES.get(name, 'studies.' + name.replace('-', '_'))}"


def parse(name: str, arguments: Sequence[str]) -> Namespace:
    """Options of a command; `command` is its name, `fit` are options of `fit`."""
    file = Path(__file__).parents[2] / f"{module_of(name).replace('.', '/')}.py"
    parser = _Parser(
        prog=f"python -m simnpo_pl {name}",
        description=ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(command=name)
    getattr(options, name.replace("-", "_"))(parser.add_argument)
    found, unknown = parser.parse_known_args(arguments)
    if name in TAKE_FIT_OPTIONS:
        found.fit = unknown
    elif unknown:
        closest = nearest(unknown[0].partition("=")[0], parser._option_string_actions)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{closest}")
    return found
