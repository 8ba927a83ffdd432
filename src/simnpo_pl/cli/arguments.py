"""What the command line adds to its parser: the run's own options, and a rule for a changed objective.

The parser keeps every setting that the new class also has: a `beta` tuned for SimNPO would silently become NPO's. So
the old value is cleared, with the loss weights and the choice of parameters, wherever a later config or flag names
another class.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

RUN_OPTIONS = {
    "run_dir": ("TEXT", None, "Folder of this run; null makes a fresh one under runs/."),
    "ckpt_path": ("TEXT", None, "Checkpoint to go on with; last takes that of --run_dir."),
    "seed_everything": ("N", 0, "Seed of everything that is drawn, from 0 on."),
    "trust_remote_code": (
        "true|false",
        False,
        "Whether code that comes with a model or tokenizer is run, with all your rights.",
    ),
}
"""Options beside the groups: kind, default and help."""
TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
"""What differs from Lightning's defaults."""

CLEARED = {
    "model.objective": ("model.objective", "model.forget_weight", "model.retain_weight", "model.trainable"),
    "model.retain_loss": ("model.retain_loss",),
}
"""Option that names a class to the options cleared where the class changes."""


def clear_changed_classes(arguments: list[str]) -> list[str]:
    """Insert `--OPTION null` before every source that names another class than the sources before it.

    Args:
        arguments: Of the command line, in order.
    """
    current: dict[str, str] = {}
    flags: set[str] = set()
    result: list[str] = []
    for name, value, words in _options(arguments):
        for option, named in _named(name, value):
            if option in current and current[option] != named:
                # A weight that a flag set stays: the user said it of this very run.
                cleared = [c for c in CLEARED[option] if c == option or c not in flags]
                result += [word for c in cleared for word in (f"--{c}", "null")]
            current[option] = named
        flags.add(name)
        result += words
    return result


_INSIDE = re.compile(r"""Parser key "([\w.]+)": .*?class_path '[\w.]*?(\w+)': (.*)""")
_UNKNOWN = re.compile(r"""unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted""")
_WRONG = re.compile(r"""Parser key "([\w.]+)": (.*?(?:Got|Given) value: (\S.*))""")
_KIND = re.compile(r"""Expected a (?:<class '[\w.]*?(\w+)'>|typing\.Literal\[(.*?)\])""")
_OUTER = " - Expected a <class 'NoneType'> Given value type: <class 'jsonargparse"
_KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}


def plain(message: str) -> str:
    """What the parser says, in the command line's own words where these are known.

    Args:
        message: Of the parser.
    """
    message = " ".join(message.split())
    inside = _INSIDE.match(message)
    if inside is None:
        return re.sub(r'^Parser key "([\w.]+)": ', r"--\1: ", message)
    group, owner, problem = inside[1], inside[2], inside[3].partition(_OUTER)[0]
    unknown, wrong = _UNKNOWN.match(problem), _WRONG.match(problem)
    if unknown is not None:
        name = unknown[1] or unknown[2]
        return f"--{group}.{name}: {owner} has no such setting; python -m simnpo_pl fit --help lists those there are"
    kinds = _KIND.findall(wrong[2]) if wrong is not None else []
    if wrong is None or not kinds:
        return message
    expected = " or ".join(_KINDS.get(kind, kind) or words.replace("', '", "' or '") for kind, words in kinds)
    return f"--{group}.{wrong[1]}: expected {expected}, got {wrong[3]}"


def unknown_class(message: str, bases: Mapping[str, type[Any]]) -> str | None:
    """An answer to the name of an unknown class, with the known ones; None where the parser says something else.

    Args:
        message: Of the parser.
        bases: Options that name a class, and what it is a kind of.
    """
    name = re.search(r"Expected a dot import path string: (\S+)", message)
    for option, base in bases.items():
        if f'"{option}"' in message and name:
            found = {cls.__name__: cls.__module__ for cls in _subclasses(base)}
            ours = [n for n, m in found.items() if m.startswith("simnpo_pl.") and not m.endswith(".base")]
            known = ", ".join(sorted(n for n in ours if not n.startswith("Lazy")))
            return f"--{option} {name[1]}: no such class; known are {known}, or give the class path of your own"
    return None


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _options(arguments: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Name, value and words of every option."""
    position = 0
    while position < len(arguments):
        word = arguments[position]
        name, equals, value = word.partition("=")
        following = arguments[position + 1 : position + 2]
        takes_next = word.startswith("-") and not equals and bool(following) and not following[0].startswith("--")
        words = arguments[position : position + 2] if takes_next else [word]
        yield name.lstrip("-"), words[1] if takes_next else value, words
        position += len(words)


def _named(name: str, value: str) -> Iterator[tuple[str, str]]:
    """Options whose class one source names, with that class."""
    if name.removesuffix(".class_path") in CLEARED:
        yield name.removesuffix(".class_path"), _class_name(value)
    elif name in ("config", "c"):
        content = _read(value)
        for option in CLEARED:
            group, key = option.split(".")
            given = content.get(group)
            entry = given.get(key) if isinstance(given, dict) else None
            if isinstance(entry, dict):
                entry = entry.get("class_path")
            if isinstance(entry, str):
                yield option, _class_name(entry)


def _class_name(value: str) -> str:
    return value.rsplit(".", 1)[-1]


def _read(file: str) -> dict[str, Any]:
    # What is wrong with the file is for the parser to say.
    try:
        content = yaml.safe_load(Path(file).expanduser().read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
