"""Files that are written completely or not at all."""

import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from simnpo_pl.utils.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that takes the name `path` once it is completely on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        for cause in causes(error):
            if isinstance(cause, OSError) and cause.filename is None:
                cause.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def replace(fresh: Path, target: Path) -> None:
    """Renames a finished file or folder to `target`, which is removed last.

    A folder cannot replace another in one step: a kill between the two leaves the old one as `.NAME.old`, which
    `recover` restores.
    """
    if fresh.is_dir():
        # Some libraries write files that other users cannot read, whatever the umask; the folder follows it.
        mode = fresh.stat().st_mode & 0o666
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        recover(target)
        try:
            if target.exists():
                target.rename(_old(target))
            fresh.rename(target)
        finally:
            recover(target)
    else:
        os.replace(fresh, target)
    _sync_folder(target.parent)


def recover(target: Path) -> None:
    """Restores a folder that a kill left without its name, or removes the one it replaced."""
    old = _old(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def clean(folder: Path) -> None:
    """Removes what a killed process left unfinished in a folder."""
    for left in (*folder.glob(".*.tmp"), *folder.glob(".*.new")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Numbers that are not finite become null."""
    write_text(path, json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Numbers that are not finite become null."""
    write_text(path, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))


def read_json(file: Path) -> Any:
    """The content of a file that a run wrote; raises UserError where it is damaged."""
    return _parse(file, file.read_text(encoding="utf-8"))


def read_json_lines(file: Path) -> list[Any]:
    """The rows of a file that a run wrote; raises UserError where it is damaged."""
    # Not splitlines(): answers may hold other line separators, such as U+2028.
    return [_parse(file, line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _sync_folder(folder: Path) -> None:
    """New names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _parse(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): give another folder, or fix the file") from error


def finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def program(name: str | None = None) -> str:
    """A program of this environment as it is to be typed here, by default Python: its name if the shell finds it,
    else its path.
    """
    path = Path(sys.executable).with_name(name or Path(sys.executable).name)
    found = shutil.which(path.name)
    if found is not None and Path(found).parent == path.parent:
        return path.name
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))
