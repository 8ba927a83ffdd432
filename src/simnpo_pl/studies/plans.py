"""Files that say which runs a command makes: of a sweep, a tuning, a study."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser

from simnpo_pl.utils.errors import UserError

Words = str | list[str]
"""Options as on a command line, in one text or several."""
T = TypeVar("T")


def words_of(text: Words) -> list[str]:
    """The words of options, as a shell splits them."""
    return [word for line in ([text] if isinstance(text, str) else text) for word in shlex.split(line)]


def read_plan(files: Sequence[Path], kind: type[T], example: str, by_name: Sequence[str] = ()) -> T:
    """What YAML files say together, as a dataclass.

    Args:
        files: The first, and those that change it.
        kind: The dataclass.
        example: A file of this kind that is right, for messages.
        by_name: Mappings whose entries a later file changes one by one, or removes by null; all else it replaces.

    Raises:
        UserError: A file is missing or holds something else.
    """
    content: dict[str, Any] = {}
    for file in files:
        try:
            read = yaml.safe_load(file.expanduser().read_text())
        except OSError as error:
            raise UserError(f"cannot read {file} ({error.strerror}): give a file such as {example}") from error
        except yaml.YAMLError as error:
            raise UserError(f"{file} is no YAML ({' '.join(str(error).split())[:200]})") from error
        if not isinstance(read, dict):
            raise UserError(f"{file} is no mapping; {example} shows what is expected")
        for name in by_name:
            if isinstance(read.get(name), dict):
                known = content.get(name)
                merged = {**known, **read[name]} if isinstance(known, dict) else read[name]
                read[name] = {key: value for key, value in merged.items() if value is not None}
        content |= read
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "plan", instantiate=True)
    try:
        return parser.instantiate(parser.parse_object({"plan": content})).plan
    except Exception as error:
        # What a class says of its own settings is the cause of what the parser says.
        own = next((one for one in (error, error.__cause__) if isinstance(one, UserError)), None)
        reason = " ".join(str(own or error).split())[:300]
        raise UserError(f"{files[-1]}: {reason}; {example} shows what is expected") from error
