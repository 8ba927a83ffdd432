"""What the command line adds to jsonargparse: a rule for a changed objective, errors in one line, a shorter help.

The parser keeps every setting that a new class also has: a `beta` tuned for SimNPO would silently become NPO's. So the
settings, the loss weights and the choice of parameters are cleared wherever a later config or flag names another class.
"""

import inspect
import os
import pydoc
import re
from argparse import Action
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import DefaultHelpFormatter

from simnpo_pl.benchmarks.base import PairedData
from simnpo_pl.module.updates import UpdateRule
from simnpo_pl.objectives import Objective
from simnpo_pl.objectives.retain import RetainLoss
from simnpo_pl.utils.errors import UserError, nearest
from simnpo_pl.utils.files import causes

CLEARED = {
    "model.objective": ("model.objective", "model.forget_weight", "model.retain_weight", "model.trainable"),
    "model.retain_loss": ("model.retain_loss",),
    "model.update": ("model.update",),
}
"""Option that names a class to the options cleared where the class changes."""
CLASSES: dict[str, type[Any]] = {
    "model.objective": Objective,
    "model.retain_loss": RetainLoss,
    "model.update": UpdateRule,
    "data": PairedData,
}
"""Options that name a class, with the base class."""
# The first type that accepts a value reads it, and typing.Union keeps the order of types in which any module had it
# first: after `import rich.console`, `--trainer.limit_train_batches 1` would be 1.0, all batches.
_TYPES = pl.Trainer.__init__.__annotations__
_TYPES.update({name: int | float | None for name, kind in _TYPES.items() if kind == int | float | None})


def clear_changed_classes(arguments: list[str]) -> list[str]:
    """Insert `--OPTION null` before every config or flag that names another class than those before it."""
    current: dict[str, str] = {}
    flags: set[str] = set()
    result: list[str] = []
    for name, value, words in _options(arguments):
        for option, named in _named_classes(name, value):
            if current.get(option, named) != named:
                # A weight given by a flag is kept: it was meant for this very run.
                cleared = [c for c in CLEARED[option] if c == option or c not in flags]
                result += [word for c in cleared for word in (f"--{c}", "null")]
            current[option] = named
        flags.add(name)
        result += words
    return result


def _options(arguments: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, value and words of every option: `--NAME VALUE`, `--NAME=VALUE` or `--NAME`."""
    words = list(arguments)
    while words:
        given = [words.pop(0)]
        name, equals, value = given[0].partition("=")
        if name.startswith("-") and not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
            given.append(value)
        yield name.lstrip("-"), value, given


def _named_classes(name: str, value: str) -> Iterator[tuple[str, str]]:
    """Options of `CLEARED` whose class a flag or config names, with the class."""
    if name.removesuffix(".class_path") in CLEARED:
        yield name.removesuffix(".class_path"), value.rsplit(".", 1)[-1]
    elif name in ("config", "c"):
        try:
            content = yaml.safe_load(Path(value).expanduser().read_text())
        except (OSError, ValueError, yaml.YAMLError):
            # The parser says what is wrong with the file.
            return
        for option in CLEARED:
            group, key = option.split(".")
            settings = content.get(group) if isinstance(content, dict) else None
            entry = settings.get(key) if isinstance(settings, dict) else None
            if isinstance(entry, dict):
                entry = entry.get("class_path")
            if isinstance(entry, str):
                yield option, entry.rsplit(".", 1)[-1]


# jsonargparse's exceptions have no fields: option, class and types are only in their messages.
_OPTION = re.compile(r'Parser key "([\w.]+)":')
_OWNER = re.compile(r"Problem with given class_path '([\w.]*?(\w+))'")
_TYPE = re.compile(r"<class '[\w.]*?(\w+)'>|typing\.Literal\[(.*?)\]")
_NO_CLASS = "Expected a dot import path string: "
_REFUSED = re.compile(r"Option '(\w+)' is not accepted")
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_RUN = "give --config FILE of a run, such as configs/demo.yaml, or --model.name MODEL and --data CLASS"


def explain(error: Exception, options: Iterable[str]) -> str:
    """One line for an error of the parser: the option, then the innermost of the errors that led to it.

    `options` are those of a run, with their dashes.
    """
    messages = [" ".join(str(cause).split()) for cause in causes(error)]
    names = dict.fromkeys(found[1] for message in messages if (found := _OPTION.match(message)))
    if messages[0].startswith("the following arguments are required"):
        return f"no benchmark is named: {_RUN}"
    if not names:
        mistyped = re.search(r"--[\w.]+|(?<=does not accept option ')[\w.]+", messages[0])
        return messages[0] + (_nearest_option(mistyped[0], options) if mistyped else "")
    option, reason = f"--{'.'.join(names)}", messages[-1]
    owner, refused = _OWNER.search(messages[0]), _REFUSED.search(reason)
    if base := CLASSES.get(option[2:]):
        classes = _known_classes(base)
        known = ", ".join(classes)
        if reason.startswith(_NO_CLASS):
            name = reason.removeprefix(_NO_CLASS)
            here = f"no such class{nearest(name, classes)}; known are {known}"
            return f"{option} {name}: {here}, or give the class path of a custom one"
        if owner and refused and owner[2] == base.__name__:
            return f"{option}.{refused[1]} needs a class: give --config FILE or {option} first, one of {known}"
    if owner and refused:
        closest = nearest(refused[1], _settings(pydoc.locate(owner[1])))
        return f"{option}: {reason} by {owner[2]}{closest}; {option}.help {owner[2]} lists its settings"
    if option == "--model.name":
        return f"no model is named: {_RUN}"
    if option == "--config" and reason.startswith("File does not exist: '"):
        given = os.path.relpath(reason.split("'")[1])
        files = {file.stem: str(file) for file in Path("configs").rglob("*.yaml")}
        near = [f"; the nearest is {files[stem]}" for stem in get_close_matches(Path(given).stem, files, 1)]
        place = near or ["; run this from the repository's folder, or give the file's full path"]
        return f"--config: file {given} does not exist{place[0]}"
    expected, _, value = reason.partition(". Got value: ")
    if not value:
        return f"{option}: {reason}"
    # Where several types are possible the innermost error is only of the first one.
    union = messages[-2].partition("Subtypes: [")[2].partition("] Errors: ")[0]
    types = _TYPE.sub(lambda kind: kind[1] or kind[2], union or expected.removeprefix("Expected a "))
    words = re.sub(r"list\[(\w+)\]", r"list of \1", types.replace(", ", " or "))
    words = re.sub(r"\w+", lambda word: _WORDS.get(word[0], word[0]), words)
    return f"{option}: expected {words}, got {value}"


def _nearest_option(mistyped: str, options: Iterable[str]) -> str:
    """The option that was most likely meant: one that ends in the same word, else one that is spelled like it."""
    known = {
        f"--{option}.{name}"
        for option, base in CLASSES.items()
        for cls in _known_classes(base).values()
        for name in _settings(cls)
    }
    known.update(options)
    same = [option for option in known if re.split(r"[.-]", option)[-1] == re.split(r"[.-]", mistyped)[-1]]
    return f"; the nearest is {same[0]}" if len(same) == 1 else nearest(mistyped, sorted(same or known))


def _settings(cls: Any) -> set[str]:
    """Names that a class is configured with, its bases' too."""
    names = {name for base in cls.__mro__ for name in inspect.signature(base.__init__).parameters}
    return names - {"self", "args", "kwargs"}


def _known_classes(base: type[Any]) -> dict[str, type[Any]]:
    """Subclasses, by name, in this package, without bases and the parser's stand-ins for defaults."""
    found, new = set(), {base}
    while new := {sub for cls in new for sub in cls.__subclasses__()}:
        found |= new
    ours = [c for c in found if c.__module__.startswith("simnpo_pl.") and not c.__module__.endswith(".base")]
    return {c.__name__: c for c in sorted(ours, key=lambda c: c.__name__) if not c.__name__.startswith("Lazy")}


def check_accelerator(name: Any) -> None:
    """Refuse a GPU that is asked for where PyTorch finds none."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name in (*found, "gpu") and not found.get(name, any(found.values())):
        raise UserError(
            f"--trainer.accelerator {name}: PyTorch {torch.__version__} finds no such device here; give cpu, or auto, "
            "which takes what there is"
        )


class HelpFormatter(DefaultHelpFormatter):
    """Texts start in one column on the line after the option; known classes are listed without their modules."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def _get_help_string(self, action: Action) -> str:
        # The method that argparse's own formatters override, too.
        text, mark, classes = super()._get_help_string(action).partition("known subclasses: ")
        return text + mark + re.sub(r"[\w.]+\.(\w+)", r"\1", classes)
