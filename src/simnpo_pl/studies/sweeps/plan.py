"""What a sweep file says: the runs of a table, each with its folder and its command line."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from simnpo_pl.utils.errors import UserError

Words = str | list[str]
"""Options as on a command line, in one text or several."""
T = TypeVar("T")
COMMANDS = ("fit", "test", "task-vector")


@dataclass(frozen=True)
class Planned:
    """A run, or a model that runs start from.

    Args:
        name: Such as `forget05/SimNPO/seed-0`; the folder under the sweep's.
        command: `fit`, `test` or `task-vector`.
        options: Of that command, its folder aside.
        after: Commands over the finished run, such as an evaluation by another program.
    """

    name: str
    command: str
    options: tuple[str, ...]
    after: tuple[tuple[str, ...], ...] = ()
    split: str = ""
    method: str = ""


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep file, `configs/sweep/table1.yaml` for example.

    In options `{folder}`, `{split}`, `{seed}` and `{run}` stand for the sweep's folder, the run's split and seed, and,
    in `after`, the run's own folder. Options may begin with `test` or `task-vector`; without, they are those of `fit`.

    Args:
        title: Of the table.
        folder: Holds the runs.
        table: Name of the table's columns, see `tables.COLUMNS`.
        methods: Row of the table to the options of its runs.
        splits: Part of the table to the options of its runs.
        seeds: A run each.
        fit: Options of every run, before those of split and method.
        models: Models made before the runs: name to options; each lies in `{folder}/models/NAME`.
        after: Commands over each finished run.
        note: Said below the table.
    """

    title: str
    folder: str
    table: str
    methods: dict[str, Words]
    splits: dict[str, Words] = field(default_factory=lambda: {"all": ""})
    seeds: list[int] = field(default_factory=lambda: [0])
    fit: Words = ""
    models: dict[str, Words] = field(default_factory=dict)
    after: list[str] = field(default_factory=list)
    note: str = ""

    def runs(self, more: Sequence[str] = ()) -> list[Planned]:
        """All runs, in the order in which they are made.

        Args:
            more: Further options of every `fit` and `test`.
        """
        planned = []
        for split, of_split in self.splits.items():
            for method, of_method in self.methods.items():
                command, own = _command(of_method)
                for seed in self.seeds:
                    name = f"{split}/{method}/seed-{seed}"
                    values = {"split": split, "seed": str(seed), "run": str(self.path / name)}
                    words = [*words_of(self.fit), *words_of(of_split), *own, "--seed_everything", str(seed), *more]
                    after = tuple(tuple(self._filled(words_of(line), values)) for line in self.after)
                    planned.append(Planned(name, command, tuple(self._filled(words, values)), after, split, method))
        return planned

    def made_models(self, more: Sequence[str] = ()) -> list[Planned]:
        """The models that runs start from or compare with.

        Args:
            more: Further options of every `fit` and `test`.
        """
        planned = []
        for name, words in self.models.items():
            command, own = _command(words)
            own = own if command == "task-vector" else [*own, *more]
            planned.append(Planned(f"models/{name}", command, tuple(self._filled(own, {}))))
        return planned

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder).expanduser()

    def _filled(self, words: Sequence[str], values: dict[str, str]) -> list[str]:
        # Not str.format: prompt templates have braces of their own.
        filled = list(words)
        for name, value in {"folder": str(self.path), **values}.items():
            filled = [word.replace("{" + name + "}", value) for word in filled]
        return filled


def read_sweep(files: Sequence[Path]) -> Sweep:
    """The sweep in a file; files after it change it: methods and models by name, all else as a whole.

    Raises:
        UserError: A file is missing or holds something else.
    """
    sweep = read_plan(files, Sweep, ("methods", "models"), "configs/sweep/table1.yaml")
    for part in ("methods", "splits", "seeds"):
        if not getattr(sweep, part):
            raise UserError(f"the sweep has no {part}: name at least one")
    return sweep


def read_plan(files: Sequence[Path], kind: type[T], by_name: Sequence[str], example: str) -> T:
    """What several YAML files say together, as a dataclass.

    Args:
        files: The first, and those that change it.
        kind: The dataclass.
        by_name: Mappings whose entries a later file changes one by one, or takes out by null; all else it replaces.
        example: A file that is right.

    Raises:
        UserError: A file is missing or holds something else.
    """
    from jsonargparse import ArgumentParser

    content: dict[str, Any] = {}
    for file in files:
        try:
            read = yaml.safe_load(file.expanduser().read_text())
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}): give a file such as {example}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{file} is no YAML ({' '.join(str(error).split())[:200]})") from error
        if not isinstance(read, dict):
            raise UserError(f"{file} has nothing of this kind; {example} shows what is expected")
        for key, value in read.items():
            merged = key in by_name and isinstance(value, dict) and isinstance(content.get(key), dict)
            content[key] = {**content[key], **value} if merged else value
    for key in by_name:
        if isinstance(content.get(key), dict):
            content[key] = {name: entry for name, entry in content[key].items() if entry is not None}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "plan", instantiate=True)
    try:
        return parser.instantiate(parser.parse_object({"plan": content})).plan
    except UserError:
        raise
    except Exception as error:
        # What a class says of its own settings is the cause of what the parser says.
        own = error.__cause__ if isinstance(error.__cause__, UserError) else error
        reason = " ".join(str(own).split())[:300]
        raise UserError(f"{files[-1]}: {reason}; {example} shows what is expected") from error


def _command(words: Words) -> tuple[str, list[str]]:
    """Command and options; without a command they are those of `fit`."""
    split = words_of(words)
    if split and not split[0].startswith("-"):
        if split[0] not in COMMANDS:
            raise UserError(f"options {' '.join(split)[:80]!r}: begin with an option, or with {', '.join(COMMANDS)}")
        return split[0], split[1:]
    return "fit", split


def words_of(text: Words) -> list[str]:
    """The words of options, as a shell splits them."""
    return [word for line in ([text] if isinstance(text, str) else text) for word in shlex.split(line)]
