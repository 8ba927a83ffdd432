"""Reads rows of text from files, folders and the Hugging Face hub, and refuses unusable ones.

Single files are not read by `datasets`: it names no line of a malformed JSON file, guesses types of CSV columns and
copies every local file to its cache.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.utils.errors import UserError, nearest

Row = dict[str, Any]
AnyRow = Mapping[str, Any] | str
"""A row with `question` and `answer`, or a plain text."""
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
_HUB = "hf://datasets/"
_PART = re.compile(r"(?P<name>\w[\w./-]*)(\[(?P<start>-?\d{1,9}%?)?:(?P<stop>-?\d{1,9}%?)?\])?")


def load_split(path: str, split: str, columns: Sequence[str]) -> list[Row]:
    """Reads the rows of a split expression, in its order.

    Args:
        path: A folder with a file for each split, or a hub data set with a configuration (or CONFIGURATION/SPLIT).
        split: Names with optional slices as in the `datasets` package, joined by `+`: `forget01+retain99[-10%:]`.
        columns: Columns every row must have; other columns are kept.

    Raises:
        UserError: The expression is malformed, a file or a column is missing, or a slice selects no row.
    """
    rows: list[Row] = []
    for part in split.split("+"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UserError(f"split {split!r}: cannot read {part!r}; write NAME, NAME[:N] or NAME[A:B], joined by +")
        found = _read_split(path, match["name"])
        _check_columns(found, columns, f"split {match['name']!r} of {path}")
        chosen = found[_slice(match, len(found))]
        if not chosen:
            raise UserError(f"split {match[0]!r} selects no row: there are {len(found)}, counted from 0")
        rows += chosen
    return rows


def load_table(source: str, option: str, columns: Sequence[str] = ()) -> list[Row]:
    """Reads all rows of one source, at least one.

    Args:
        source: A file: `.json` or `.jsonl` of objects or strings, `.csv` with a header, `.parquet`, `.txt` of documents
            between blank lines (a string or document becomes the column `text`); `hf://datasets/OWNER/NAME/FILE`; or a
            folder or OWNER/NAME that the `datasets` package loads, with `:SPLIT` or `:CONFIGURATION/SPLIT` after it.
        option: Setting that names the source, for messages.
        columns: Columns every row must have; other columns are kept.

    Raises:
        UserError: There is no such source, it cannot be read or is empty, or a column is missing.
    """
    if is_file(source):
        rows = _read_file(hub_file(source, option), option)
    else:
        place, _, wanted = source.removeprefix(_HUB).partition(":")
        configuration, _, split = wanted.rpartition("/")
        rows = _load_data_set(place, configuration or None, split or None, option)
    _check_columns(rows, columns, f"{option} {source}")
    return rows


def is_file(source: str) -> bool:
    """Whether a source is a file, by its ending or because there is one."""
    return source.endswith(_FILES) or _local(source).is_file()


def load_lines(file: str) -> list[str]:
    """Reads the non-empty lines of a UTF-8 text file, at least one, without surrounding white space."""
    lines = [line.strip() for line in _read_text(_local(file), "--data.refusals").split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{file} has no text: expected one entry per line")
    return lines


def hub_file(path: str, option: str = "--eval.retain_log") -> Path:
    """A local path, or the local copy of a file named hf://datasets/OWNER/NAME/FILE."""
    if not path.startswith(_HUB):
        return _local(path)
    parts = path.removeprefix(_HUB).split("/", 2)
    if len(parts) < 3:
        raise UserError(f"{option} {path}: expected {_HUB}OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset"))
    except Exception as error:
        optional = option == "--eval.retain_log"
        other = f", --eval.retrained FOLDER, or {option} null to leave out forget quality" if optional else ""
        failed = f"cannot download {path} ({type(error).__name__})"
        raise UserError(f"{option}: {failed}; give {option} FILE{other}") from error


def column_of(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a column; raises UserError where the row has no such column."""
    if column not in row:
        raise UserError(f"{where}, has no column {column!r}; its columns are: {', '.join(row) or 'none'}; rename one")
    return row[column]


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of a column; raises UserError where the row has none."""
    value = column_of(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: expected text as {column}, got {value!r:.80}; fix or remove the row")
    return value


def texts_of(row: Mapping[str, Any], column: str, where: str) -> list[str]:
    """The list of texts of a column; raises UserError where the row has none."""
    texts = column_of(row, column, where)
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)):
        raise UserError(f"{where}: expected a list of texts as {column}, got {texts!r:.80}; fix or remove the row")
    return texts


def check_rows(rows: Sequence[AnyRow], name: str) -> None:
    """Refuses blank rows, and rows that repeat others but for white space; messages call them `name`."""
    seen: dict[tuple[str, ...], int] = {}
    for index, row in enumerate(rows):
        texts = {"text": row} if isinstance(row, str) else row
        columns = ("text",) if isinstance(row, str) else ("question", "answer")
        key = tuple(text_of(texts, column, f"{name} row {index}, counted from 0").strip() for column in columns)
        first = seen.setdefault(key, index)
        if first != index:
            where = f"{name} rows {first} and {index}, counted from 0,"
            raise UserError(f"{where} have the same {' and '.join(columns)}: remove one")


def check_disjoint(one: Sequence[AnyRow], other: Sequence[AnyRow], name: str, first: str = "forget") -> None:
    """Refuses two sets that share a row, but for white space around texts; messages call them `first` and `name`."""

    def key(row: AnyRow) -> tuple[str, str]:
        return ("", row.strip()) if isinstance(row, str) else (row["question"].strip(), row["answer"].strip())

    places = {key(row): index for index, row in reversed(list(enumerate(other)))}
    shared = [(index, places[key(row)]) for index, row in enumerate(one) if key(row) in places]
    if shared:
        raise UserError(
            f"{len(shared)} of {len(one)} {first} rows are also {name} rows; the first is {first} row "
            f"{shared[0][0]} = {name} row {shared[0][1]}, counted from 0; remove them from one of the sets"
        )


def _check_columns(rows: Sequence[Row], columns: Sequence[str], source: str) -> None:
    if not rows:
        raise UserError(f"{source} has no rows: expected at least one; choose other data")
    for index, row in enumerate(rows):
        for column in columns:
            column_of(row, column, f"{source}: row {index}, counted from 0")


def _slice(match: re.Match[str], rows: int) -> slice:
    ends = match["start"], match["stop"]
    # One percent sign makes both ends percentages, as in `datasets`.
    unit = rows / 100 if any(end and end.endswith("%") for end in ends) else 1
    return slice(*(None if end is None else round(int(end.rstrip("%")) * unit) for end in ends))


def _read_split(path: str, name: str) -> list[Row]:
    folder = _local(path)
    if not folder.is_dir():
        configuration, _, split = name.partition("/")
        return _load_data_set(path, configuration, split or "train", "--data.path")
    for suffix in _FILES:
        if (file := folder / f"{name}{suffix}").is_file():
            return _read_file(file, "--data.path")
    names = sorted({file.stem for file in (folder / name).parent.glob("*") if file.suffix in _FILES})
    there = f"the splits are: {', '.join(names) or 'none'}"
    raise UserError(f"no split {name!r} in {path}{nearest(name, names)}; {there}; choose one")


def _local(path: str) -> Path:
    return Path(os.path.expanduser(path))  # Path.expanduser() fails for unknown users


def _read_file(file: Path, option: str) -> list[Row]:
    """All rows of a file; strings in JSON, and the documents of a text file, become the column `text`."""
    if file.suffix not in _FILES:
        raise UserError(f"{file}: expected a file ending in {', '.join(_FILES)}; convert it")
    if file.suffix == ".parquet":
        return _read_parquet(file, option)
    text = _read_text(file, option)
    if file.suffix == ".csv":
        return _read_csv(text, file)
    if file.suffix == ".txt":
        # More than one blank line belongs to the document before it, so that joining gives the file again.
        values: list[Any] = re.split(r"\n\n(?=\S)", text.lstrip("\n")) if text.strip() else []
    elif text.lstrip().startswith("["):
        values = _parse_json(text, file, 1)
    else:
        # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
        lines = enumerate(text.split("\n"), start=1)
        values = [_parse_json(line, file, number) for number, line in lines if line.strip()]
    rows = [{"text": value} if isinstance(value, str) else value for value in values]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            got = f"expected a JSON object with the columns, got {type(row).__name__}"
            raise UserError(f"{file} row {index}, counted from 0: {got}")
    return rows


def _read_text(file: Path, option: str) -> str:
    try:
        # Without the byte order mark that some editors write.
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise UserError(f"{option}: cannot read {file} ({error.strerror}): give an existing, readable file") from error


def _parse_json(text: str, file: Path, line: int) -> Any:
    """The value of a JSON text that starts at a line, from 1, of a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line, reason = line + error.lineno - 1, error.msg
        raise UserError(
            f"{file} line {line}: not valid JSON ({reason}); expected one object per line or one array of objects"
        ) from error


def _read_csv(text: str, file: Path) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                wanted = f"expected {len(reader.fieldnames or ())} fields as in the first line"
                raise UserError(f"{file} line {reader.line_num}: {wanted}; fix it")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{file} after line {reader.line_num}: not valid CSV ({error}); fix it") from error
    return rows


def _read_parquet(file: Path, option: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file).read().to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{option}: cannot read {file} as parquet ({reason}): give a complete file") from error


def _load_data_set(place: str, configuration: str | None, split: str | None, option: str) -> list[Row]:
    """All rows of one split of a folder or hub data set, by `datasets`; without a name, of `train` or the only one."""
    folder = _local(place)
    if not folder.is_dir() and (place.startswith(("/", "./", "../", "~")) or place.count("/") != 1):
        raise UserError(
            f"{option} {place}: expected a folder, or OWNER/NAME of a data set on the hub; files end in "
            f"{', '.join(_FILES)}"
        )
    import datasets

    names = (str(folder) if folder.is_dir() else place, configuration)
    try:
        found = datasets.load_dataset(*names, split=split)
        if split is None:
            if "train" not in found and len(found) > 1:
                raise ValueError(f"it has the splits {', '.join(found)}; name one, as in {place}:{next(iter(found))}")
            split = "train" if "train" in found else next(iter(found))
            found = found[split]
        if getattr(found, "builder_name", None) == "csv":
            # By itself it makes numbers of digits, and None of NA.
            texts = datasets.Features(dict.fromkeys(found.column_names, datasets.Value("string")))
            found = datasets.load_dataset(*names, split=split, features=texts, keep_default_na=False)
        return [dict(row) for row in found]
    except (TypeError, AttributeError):
        # Faults of the program; errors of the hub have many classes, which change with its HTTP client.
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(
            f"{option} {place}: cannot load configuration {configuration or 'default'}, split {split or 'train'} "
            f"({reason}); check names and connection, or give {option} FOLDER; configs/demo.yaml needs no network"
        ) from error
