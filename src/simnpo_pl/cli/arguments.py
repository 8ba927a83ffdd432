"""What the command line adds to jsonargparse: a rule for a changed objective, errors in one line, a shorter help.

The parser keeps every setting that a new class also has: a `beta` tuned for SimNPO would silently become NPO's. So the
settings, the loss weights and the choice of parameters are cleared wherever a later config or flag names another class.
"""

import re
from argparse import Action
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import DefaultHelpFormatter

from simnpo_pl.utils.files import causes

CLEARED = {
    "model.objective": ("model.objective", "model.forget_weight", "model.retain_weight", "model.trainable"),
    "model.retain_loss": ("model.retain_loss",),
}
"""Option that names a class to the options cleared where the class changes."""


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
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("-") and not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
            yield name.lstrip("-"), value, [word, value]
        else:
            yield name.lstrip("-"), value, [word]


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
_OWNER = re.compile(r"Problem with given class_path '[\w.]*?(\w+)'")
_TYPE = re.compile(r"<class '[\w.]*?(\w+)'>|typing\.Literal\[(.*?)\]")
_NO_CLASS = "Expected a dot import path string: "


def explain(error: Exception, bases: Mapping[str, type[Any]]) -> str:
    """One line for an error of the parser: the option, then the innermost of the errors that led to it.

    `bases` has the options that name a class, with the base class.
    """
    messages = [" ".join(str(cause).split()) for cause in causes(error)]
    names = dict.fromkeys(found[1] for message in messages if (found := _OPTION.match(message)))
    if not names:
        return messages[0]
    option, reason = f"--{'.'.join(names)}", messages[-1]
    owner = _OWNER.search(messages[0])
    if base := bases.get(option[2:]):
        known = ", ".join(_known_classes(base))
        if reason.startswith(_NO_CLASS):
            name = reason.removeprefix(_NO_CLASS)
            return f"{option} {name}: no such class; known are {known}, or give the class path of a custom one"
        if owner and owner[1] == base.__name__:
            return f"{option}: {reason} before a class is chosen: give --config or {option} first, one of {known}"
    if owner and reason.endswith("is not accepted"):
        return f"{option}: {reason} by {owner[1]}; {option}.help {owner[1]} lists its settings"
    expected, _, value = reason.partition(". Got value: ")
    if not value:
        return f"{option}: {reason}"
    # Where several types are possible the innermost error is only of the first one.
    union = messages[-2].partition("Subtypes: [")[2].partition("] Errors: ")[0]
    types = _TYPE.sub(lambda kind: kind[1] or kind[2], union or expected.removeprefix("Expected a "))
    return f"{option}: expected {types.replace('NoneType', 'null').replace(', ', ' or ')}, got {value}"


def _known_classes(base: type[Any]) -> list[str]:
    """Subclasses in this package, without bases and the parser's stand-ins for defaults."""
    found, new = set(), {base}
    while new := {sub for cls in new for sub in cls.__subclasses__()}:
        found |= new
    ours = [c for c in found if c.__module__.startswith("simnpo_pl.") and not c.__module__.endswith(".base")]
    return sorted(c.__name__ for c in ours if not c.__name__.startswith("Lazy"))


class HelpFormatter(DefaultHelpFormatter):
    """Texts start in one column on the line after the option; known classes are listed without their modules."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)

    def _get_help_string(self, action: Action) -> str:
        # The method that argparse's own formatters override, too.
        text, mark, classes = super()._get_help_string(action).partition("known subclasses: ")
        return text + mark + re.sub(r"[\w.]+\.(\w+)", r"\1", classes)
