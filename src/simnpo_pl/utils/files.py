"""Files that are either whole or not there."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from simnpo_pl.utils.errors import UserError


class Writing:
    """A temporary file beside the target that takes its name once it is whole on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = self.temporary.open("wb")
        return self.handle

    def __exit__(self, kind: object, error: BaseException | None, *rest: object) -> None:
        for cause in causes(error):
            if isinstance(cause, OSError) and cause.filename is None:
                cause.filename = str(self.path)
        try:
            if error is None:
                self.handle.flush()
                os.fsync(self.handle.fileno())
                self.handle.close()
                os.replace(self.temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            with suppress(OSError):
                # Of a file that could not be written, the rest cannot be either.
                self.handle.close()
            self.temporary.unlink(missing_ok=True)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a loss of power."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        # Some systems open no folders.
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(fresh: Path, target: Path) -> None:
    """Give a finished file or folder its name; what had the name goes last.

    A folder cannot take another's name in one step: a kill between two leaves the old one as `.NAME.old`, which
    `recover` brings back.
    """
    if fresh.is_dir():
        # Some writers make files that other users cannot read, whatever the umask; the folder follows it.
        mode = fresh.stat().st_mode & 0o666
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(mode)
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        old = _old(target)
        recover(target)
        try:
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        finally:
            recover(target)
    else:
        os.replace(fresh, target)
    sync_folder(target.parent)


def recover(target: Path) -> None:
    """Bring a folder back that a kill left without its name, or remove what is left of the one before it."""
    old = _old(target)
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def clean(folder: Path) -> None:
    """Remove what a killed process had not finished writing into a folder."""
    for left in folder.glob(".*"):
        if left.name.endswith((".tmp", ".new")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with Writing(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(content), indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines atomically; numbers that are not finite become null."""
    write_text(path, "".join(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows))


def read_json(file: Path) -> Any:
    """Content of a JSON file that a run wrote.

    Raises:
        UserError: It is damaged.
    """
    return _parse(file, file.read_text(encoding="utf-8"))


def read_json_lines(file: Path) -> list[Any]:
    """Content of a file of JSON lines that a run wrote.

    Raises:
        UserError: It is damaged.
    """
    # Not splitlines(): answers may hold other line separators, such as U+2028.
    return [_parse(file, line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _parse(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): give another folder, or mend the file") from error


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
