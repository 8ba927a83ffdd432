"""Commands beside `fit`, `validate`, `test` and `predict`: one module each, imported when it is called.

A module has `add_arguments(parser)` and `run(options)`; what is slow to import goes inside `run`. Where it sets
`TAKES_FIT_OPTIONS`, arguments it does not know are options of `fit`, and `options.fit` holds them.
"""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from simnpo_pl.utils.errors import UserError

COMMANDS = {
    "markov": "compare methods on mixtures of Markov chains, where the right answer is known",
    "leak": "sample answers of finished runs on the forget rows, and take the best of k",
    "quantize": "evaluate finished runs again after their weights were rounded to 8 and 4 bits",
    "relearn": "relearning attack on finished runs: fine-tune the unlearned model on part of what it forgot",
    "doctor": "show versions, devices, whether the hub answers, and what configs need",
    "lm-eval": "accuracy of finished runs on lm-evaluation-harness's tasks, such as wmdp_bio and mmlu",
    "bias": "run the paper's analysis of reference-model bias: runs, tables, figures",
    "perturb": "average a model's weights with random ones, for a perturbed reference",
    "report": "write a page, Markdown or LaTeX rows over finished runs",
    "scalability": "MUSE: forget sets of growing size, a run for each",
    "sustainability": "MUSE: forget sets one after the other, each on the model before",
    "sweep": "a table of the paper: methods x splits x seeds, shared among workers",
    "task-vector": "unlearn without training: take off what fine-tuning on the forget rows adds to the weights",
    "tune": "tune methods with Optuna: an equal number of trials for each, chosen by a stated rule",
    "weights": "gradient weights over finished runs, against answer length and difficulty: tables, figures",
}
"""Name of a command to what it does, in one line; its module has the name with underscores."""


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse(name: str, arguments: Sequence[str]) -> tuple[ModuleType, Namespace]:
    """Module and options of a command.

    Args:
        name: Key of `COMMANDS`.
        arguments: What follows the name.

    Raises:
        UserError: The arguments are not the command's.
    """
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    parser = _Parser(
        prog=f"python -m simnpo_pl {name}",
        description=module.__doc__,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    options, unknown = parser.parse_known_args(arguments)
    if getattr(module, "TAKES_FIT_OPTIONS", False):
        options.fit = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return module, options


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a command.

    Args:
        name: Key of `COMMANDS`.
        arguments: What follows the name.

    Raises:
        UserError: The arguments are not the command's, or what it says itself.
    """
    module, options = parse(name, arguments)
    module.run(options)
