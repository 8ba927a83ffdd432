"""Reads rows, of questions and answers or of text, from local files or the Hugging Face hub and refuses unusable ones.

Every mistake a user can make here ends in one line that says what was expected, what was found and what
to do, because a wrong row found after an hour of training costs that hour.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simnpo_pl.utils.errors import UserError

_SUFFIXES = (".json", ".jsonl")
_TEXT_SUFFIXES = (*_SUFFIXES, ".txt")
_PART = re.compile(
    r"(?P<name>\w[\w./-]*)(\[((?P<start>-?\d+)(?P<start_pct>%)?)?:((?P<stop>-?\d+)(?P<stop_pct>%)?)?\])?"
)
HUB_FILES = "hf://datasets/"
_HUB_PACKAGES = ("datasets", "huggingface_hub", "httpx", "httpcore", "requests", "urllib3")


def load_split(path: str, split: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Reads the rows of a split expression.

    Args:
        path: A folder holding `NAME.json` or `NAME.jsonl` files (one JSON object or string per line, or one array of
            them), for the column `text` also `NAME.txt` files of documents between blank lines; or else the id of a
            hub data set whose configurations are the split names, or whose configuration and split are joined by
            `/`. A string or document becomes the column `text`.
        split: Names with optional slices, joined by `+`: `forget10`, `retain99[:200]`, `raw/retain1[10:20]`,
            `forget01+retain99[-10%:]`. Slices follow the `datasets` package: counted from 0, the end
            excluded, cut at the number of rows, percentages rounded to the nearest row.
        columns: Columns every row must have; other columns are kept.

    Returns:
        One dict per row, in the order of the expression.

    Raises:
        UserError: The expression is malformed, the source or a column is missing, a file is not JSON, or
            a part of the expression selects no row.
    """
    rows: list[dict[str, Any]] = []
    for match in [_match_part(part.strip(), split) for part in split.split("+")]:
        found = _load_named(path, match["name"], _TEXT_SUFFIXES if "text" in columns else _SUFFIXES)
        _check_columns(found, columns, f"split {match['name']!r} of {path}")
        chosen = found[_slice(match, len(found))]
        if not chosen:
            raise UserError(f"split {match[0]!r} selects no row: there are {len(found)}, counted from 0")
        rows += chosen
    return rows


def load_jsonl(file: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Reads one file of rows, as `load_split` does, all with the given columns.

    Raises:
        UserError: The file is missing, empty or not JSON, or a row lacks a column.
    """
    rows = _read_rows(Path(os.path.expanduser(file)))
    _check_columns(rows, columns, file)
    return rows


def load_lines(file: str) -> list[str]:
    """Reads the non-empty lines of a UTF-8 text file, without surrounding white space.

    Raises:
        UserError: The file is missing, is not UTF-8 text, or has no such line.
    """
    lines = [line.strip() for line in read_text(Path(os.path.expanduser(file))).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{file} has no text: expected one entry per line")
    return lines


def check_rows(rows: Sequence[Mapping[str, Any] | str], name: str) -> None:
    """Refuses rows without text and repeated rows, which would silently weigh more than the others.

    Args:
        rows: Rows with the columns `question` and `answer`, or plain texts.
        name: What the rows are called in messages, such as "forget".

    Raises:
        UserError: A question, an answer or a text is not text or is blank, or two rows agree, white space around the
            texts aside.
    """
    seen: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        texts = {"text": row} if isinstance(row, str) else {c: row.get(c) for c in ("question", "answer")}
        for column, value in texts.items():
            if not isinstance(value, str) or not value.strip():
                where = f"{name} row {index}, counted from 0"
                raise UserError(f"{where}: expected text as {column}, got {str(value)[:80]!r}; mend or remove the row")
        first = seen.setdefault(_pair(row), index)
        if first != index:
            where = f"{name} rows {first} and {index}, counted from 0,"
            raise UserError(f"{where} have the same {' and '.join(texts)}: remove one")


def check_disjoint(
    one: Sequence[Mapping[str, Any] | str], other: Sequence[Mapping[str, Any] | str], name: str, first: str = "forget"
) -> None:
    """Refuses data that would be forgotten and retained, or compared with itself.

    Args:
        one: Rows with the columns `question` and `answer`, or plain texts.
        other: The same.
        name: What the other rows are, such as "retain".
        first: What the first rows are.

    Raises:
        UserError: A row is in both, white space around the texts aside.
    """
    kept = {_pair(row): index for index, row in reversed(list(enumerate(other)))}
    shared = [(index, kept[_pair(row)]) for index, row in enumerate(one) if _pair(row) in kept]
    if shared:
        raise UserError(
            f"{len(shared)} of {len(one)} {first} rows are also {name} rows; the first is {first} row "
            f"{shared[0][0]} = {name} row {shared[0][1]}, counted from 0; remove them from one of the sets"
        )


def _pair(row: Mapping[str, Any] | str) -> tuple[str, str]:
    """Question and answer without surrounding white space; a plain text has no question."""
    return ("", row.strip()) if isinstance(row, str) else (row["question"].strip(), row["answer"].strip())


def _load_named(path: str, name: str, suffixes: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of one split, from a local folder or the hub."""
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        files = [file for suffix in suffixes if (file := folder / f"{name}{suffix}").is_file()]
        if not files:
            inside = (folder / name).parent
            there = sorted(inside.iterdir()) if inside.is_dir() else []
            names = {f.stem: None for f in there if f.suffix in suffixes and f.is_file()}
            raise UserError(
                f"no split {name!r} in {path}: expected {' or '.join(name + suffix for suffix in suffixes)}; "
                f"the splits there are: {', '.join(names) or 'none'}"
            )
        return _read_rows(files[0])
    if folder.exists():
        raise UserError(f"--data.path expects a folder of .json or .jsonl files, got the file {path}")
    if path.startswith(("/", "./", "../", "~")):
        raise UserError(f"no folder {path}: give an existing folder, or a hub data set id, with --data.path")
    return _load_hub(path, name)


def _load_hub(path: str, name: str) -> list[dict[str, Any]]:
    """All rows of one configuration of a hub data set, of its split where one is named, else of its training split."""
    configuration, _, split = name.partition("/")
    failure = (
        f"could not read split {name!r} of data set {path!r} from the Hugging Face hub, and there is no "
        "local folder of that name"
    )
    advice = (
        "check both names and the connection, or use local files with --data.path FOLDER; the run in configs/demo.yaml "
        "needs no network"
    )
    return [dict(row) for row in load_data_set(path, configuration, split or "train", failure, advice)]


def load_data_set(place: str, configuration: str | None, split: str | None, failure: str, advice: str) -> Any:
    """A data set as the `datasets` package loads it, but the columns of CSV files as the text that they are.

    Args:
        place: Folder, or name on the hub.
        configuration: One of its configurations.
        split: One of its splits, which may be cut; None for all of them.
        failure: What has failed, for messages.
        advice: What to do, for messages.

    Raises:
        UserError: There is no such data set, or it cannot be loaded.
    """
    import datasets

    try:
        found = datasets.load_dataset(place, configuration, split=split)
        one = next(iter(found.values())) if isinstance(found, datasets.DatasetDict) else found
        if getattr(one, "builder_name", None) == "csv":
            # By itself it makes numbers of digits, and nothing of NA.
            texts = datasets.Features(dict.fromkeys(one.column_names, datasets.Value("string")))
            found = datasets.load_dataset(place, configuration, split=split, features=texts, keep_default_na=False)
        return found
    except Exception as error:
        if not _is_hub_failure(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{failure} ({type(error).__name__}: {reason}); {advice}") from error


def _is_hub_failure(error: Exception) -> bool:
    """Whether a name or the network is to blame, rather than this program."""
    # `datasets` reports unknown configurations as ValueError and retired loading scripts as RuntimeError.
    if isinstance(error, (OSError, ValueError, RuntimeError)):
        return True
    return any(kind.__module__.startswith(_HUB_PACKAGES) for kind in type(error).__mro__)


def read_text(file: Path) -> str:
    """The text of a file, with every line end as a newline."""
    try:
        # A byte order mark, as some editors write it, is dropped.
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}): give an existing, readable file") from error


def _read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON array or of JSON lines; strings, and the documents of a text file, as column `text`."""
    text = read_text(file)
    rows: list[Any]
    if file.suffix == ".txt":
        # More than one blank line belongs to the document before it, so that joining gives the file again.
        rows = re.split(r"\n\n(?=\S)", text.lstrip("\n")) if text.strip() else []
    elif text.lstrip().startswith("["):
        rows = _parse(text, file, 1)
    else:
        # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
        lines = enumerate(text.split("\n"), start=1)
        rows = [_parse(line, file, number) for number, line in lines if line.strip()]
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            where = f"{file} row {index}, counted from 0"
            raise UserError(f"{where}: expected a JSON object with the columns, got {type(row).__name__}")
    return rows


def _parse(text: str, file: Path, line: int) -> Any:
    """The value of a JSON text that starts at a line, from 1, of a file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):
            # Numbers of thousands of digits, nesting of thousands of levels.
            raise UserError(f"{file} line {line}: {error}; expected texts and lists of texts") from error
        raise UserError(
            f"{file} line {line + error.lineno - 1}: not valid JSON ({error.msg}); expected one object per "
            "line or one array of objects"
        ) from error


def _check_columns(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], source: str) -> None:
    """Refuses an empty table and rows that lack a column."""
    if not rows:
        raise UserError(f"{source} has no rows: expected at least one; choose other data")
    for index, row in enumerate(rows):
        for column in columns:
            if column not in row:
                where, present = f"{source}: row {index}, counted from 0,", ", ".join(row) or "none"
                raise UserError(f"{where} has no column {column!r}; its columns are: {present}; rename one")


def _match_part(part: str, split: str) -> re.Match[str]:
    """Takes one part of a split expression apart."""
    match = _PART.fullmatch(part)
    if match is None:
        raise UserError(
            f"split expression {split!r}: cannot read {part!r}; write NAME, NAME[:N] or NAME[A:B], joined "
            "by +, such as forget01+retain99[:200]"
        )
    return match


def _slice(match: re.Match[str], rows: int) -> slice:
    """The rows that a part of a split expression names."""
    # One percent sign makes both ends percentages, as in `datasets`.
    share = rows / 100 if match["start_pct"] or match["stop_pct"] else 1
    return slice(*(None if end is None else round(int(end) * share) for end in (match["start"], match["stop"])))


def hub_file(path: str) -> Path:
    """A local path of a log, or the local copy of a file named hf://datasets/OWNER/NAME/PATH.

    Raises:
        UserError: The hub cannot be reached or has no such file.
    """
    return hub_download(path, "--eval.retain_log") if path.startswith(HUB_FILES) else Path(path).expanduser()


def hub_download(path: str, option: str) -> Path:
    """The local copy of a file named hf://datasets/OWNER/NAME/PATH.

    Args:
        path: The name.
        option: Setting that names it, for messages.

    Raises:
        UserError: The name is not of this form, or the hub cannot be reached or has no such file.
    """
    parts = path.removeprefix(HUB_FILES).split("/", 2)
    if len(parts) < 3:
        raise UserError(f"{option} {path}: expected {HUB_FILES}OWNER/NAME/FILE")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset"))
    except Exception as error:
        unmeasured = f", or --eval.retrained FOLDER, or {option} null for a run without forget quality"
        advice = unmeasured if option == "--eval.retain_log" else ""
        raise UserError(
            f"{option}: {path} is not to be had from the hub ({type(error).__name__}); give {option} FILE{advice}"
        ) from error
