"""Plan files, which say what runs a sweep, a tuning or a study makes."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from jsonargparse import ArgumentParser

from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import causes, write_text

Words = str | list[str]
"""Options as on a command line, in one text or several."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the files of `sweep`, `tune` and `verify` have in common.

    Args:
        title: Of the table.
        folder: Of the runs; options may name it as `{folder}`.
        fit: Options of every run, before those of its method.
    """

    EXAMPLE: ClassVar[str]
    """A correct file, for messages."""
    BY_NAME: ClassVar[tuple[str, ...]] = ()
    """Mappings whose entries a later file changes one by one, or removes by null; it replaces all else."""

    title: str
    folder: str
    fit: Words = ""

    @property
    def path(self) -> Path:
        return Path(self.folder).expanduser()

    def filled(self, words: Sequence[str], **values: str) -> list[str]:
        """Words with `{folder}` and the names of `values` replaced; not by str.format, as prompts contain braces."""
        for name, value in {"folder": str(self.path), **values}.items():
            words = [word.replace("{" + name + "}", value) for word in words]
        return list(words)


P = TypeVar("P", bound=Plan)


def write_tables(text: str, *files: Path | None) -> None:
    """Print a table and write it to the files that are given."""
    print(text)
    for file in files:
        if file is not None:
            write_text(file, text)
            print(f"written: {file}")


def words_of(text: Words) -> list[str]:
    return [word for line in ([text] if isinstance(text, str) else text) for word in shlex.split(line)]


def read_yaml(file: Path, example: str = "configs/demo.yaml") -> dict[str, Any]:
    """Content of a YAML file that holds a mapping; `example` is a correct file, for messages."""
    try:
        content = yaml.safe_load(file.expanduser().read_text())
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): give a file such as {example}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a mapping, got {type(content).__name__}; {example} is an example")
    return content


def read_plan(files: Sequence[Path], kind: type[P], folder: str | None = None) -> P:
    """A plan, read from a YAML file and those that change it; with its runs in another folder, if one is given."""
    content: dict[str, Any] = {}
    for file in files:
        read = read_yaml(file, kind.EXAMPLE)
        if {"model", "trainer"} & read.keys():
            expected = f"expected a file such as {kind.EXAMPLE}"
            raise UserError(f"{file} is the config of a run, for fit --config {file}; {expected}")
        for name in kind.BY_NAME:
            if isinstance(read.get(name), dict):
                known = content.get(name)
                merged = {**known, **read[name]} if isinstance(known, dict) else read[name]
                read[name] = {key: value for key, value in merged.items() if value is not None}
        content |= read
    if folder is not None:
        content["folder"] = folder
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "plan", instantiate=True)
    try:
        return parser.instantiate(parser.parse_object({"plan": content})).plan
    except Exception as error:
        # jsonargparse wraps what the plan's own __post_init__ raises.
        own = next((cause for cause in causes(error) if isinstance(cause, UserError)), None)
        reason = " ".join(str(own or error).split())[:300]
        raise UserError(f"{files[-1]}: {reason}; {kind.EXAMPLE} is an example") from error
