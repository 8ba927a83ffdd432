"""Tables of rows from a file, a folder or the Hugging Face hub, whatever their columns.

What cannot be read ends in one line that says what was expected, what was found and what to do.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simnpo_pl.data.sources import HUB_FILES, hub_download, load_data_set, load_jsonl, read_text
from simnpo_pl.utils.errors import UserError

_LOCAL_ROOTS = ("/", "./", "../", "~")


def load_table(source: str, option: str) -> list[dict[str, Any]]:
    """Reads a table.

    Args:
        source: A file (`.jsonl` or `.json` of objects or strings, `.csv` with a header, `.parquet`, `.txt` of documents
            between blank lines; a string or document becomes the column `text`); or a data set that the `datasets`
            package loads, a folder or OWNER/NAME on the hub, with `:SPLIT` or `:CONFIGURATION/SPLIT` after it where it
            has several; a split may be cut as in `train[:200]`. `hf://datasets/` may stand before a name on the hub,
            and before OWNER/NAME/FILE for a file there.
        option: Setting that names it, for messages.

    Returns:
        One dict per row, at least one, in order.

    Raises:
        UserError: There is no such source, or it cannot be read or is empty.
    """
    named = source.removeprefix(HUB_FILES)
    file = hub_download(source, option) if named != source and named.endswith(tuple(_READERS)) else None
    if file is None and named == source and (source.endswith(tuple(_READERS)) or Path(source).expanduser().is_file()):
        file = Path(source).expanduser()
    if file is not None:
        reader = _READERS.get(file.suffix)
        if reader is None:
            raise UserError(f"{option} {source}: expected a file ending in {', '.join(_READERS)}; convert it")
        rows = reader(file)
    else:
        rows = _load_data_set(named, option)
    if not rows:
        raise UserError(f"{option} {source} has no rows: expected at least one; choose other data")
    return rows


def _read_csv(file: Path) -> list[dict[str, Any]]:
    """Rows of a table whose first line names its columns."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                wanted = f"expected {len(reader.fieldnames or ())} fields as in the first line"
                raise UserError(f"{file} line {reader.line_num}: {wanted}; mend it")
            rows.append(dict(row))
    except csv.Error as error:
        raise UserError(f"{file} after line {reader.line_num}: not valid CSV ({error}); mend it") from error
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(file.read_bytes())).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {file} as parquet ({reason}); give an existing, whole file") from error


def _read_json(file: Path) -> list[dict[str, Any]]:
    return load_jsonl(str(file), ())


_READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_json,
}


def _load_data_set(name: str, option: str) -> list[dict[str, Any]]:
    """All rows of one split of a data set, in a folder or on the hub."""
    import datasets

    location, _, wanted = name.partition(":")
    configuration, _, split = wanted.rpartition("/")
    folder = Path(location).expanduser()
    if not folder.is_dir() and (location.startswith(_LOCAL_ROOTS) or location.count("/") != 1):
        raise UserError(
            f"{option} {name}: there is no such file or folder; expected a file ending in {', '.join(_READERS)}, a "
            "folder, or OWNER/NAME:SPLIT of a data set on the hub"
        )
    place = str(folder) if folder.is_dir() else location
    advice = (
        "check its name, configuration and split, written NAME:CONFIGURATION/SPLIT, and the connection, or give a file"
    )
    failure = f"{option}: could not load data set {name}"
    found = load_data_set(place, configuration or None, split or None, failure, advice)
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found and len(found) > 1:
            first = next(iter(found))
            raise UserError(f"{option} {name} has the splits {', '.join(found)}; name one, as in {name}:{first}")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return [dict(row) for row in found]
