import json
import os
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simnpo_pl.data.sources import (
    check_disjoint,
    check_rows,
    load_lines,
    load_split,
    load_table,
)
from simnpo_pl.utils.errors import UserError

COLUMNS = ("question", "answer")
SHARED = os.environ.get("SIMNPO_PL_SHARED")


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"question": f"q{i}", "answer": f"a{i}"} for i in range(start, start + count)]


def write_lines(file: Path, content: list[dict[str, str]]) -> None:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in content), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_lines(tmp_path / "forget10.json", rows(4))
    write_lines(tmp_path / "retain90.jsonl", rows(10, start=4))
    (tmp_path / "array.json").write_text(json.dumps(rows(2), indent=1))
    (tmp_path / "notes.txt").write_text("not a split")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("forget10", rows(4)),
        ("array", rows(2)),
        ("retain90[:3]", rows(3, 4)),
        ("retain90[8:]", rows(2, 12)),
        ("retain90[2:5]", rows(3, 6)),
        ("retain90[-2:]", rows(2, 12)),
        ("retain90[:20%]", rows(2, 4)),
        ("retain90[:500]", rows(10, 4)),
        ("forget10 + retain90[:2]", rows(6)),
        ("retain90[:1]+retain90[3:4]", [*rows(1, 4), *rows(1, 7)]),
    ],
)
def test_split_expressions_select_rows_in_order(folder: Path, split: str, expected: list[dict]) -> None:
    assert load_split(str(folder), split, COLUMNS) == expected


bound = st.none() | st.integers(-30, 30)


@given(start=bound, stop=bound, unit=st.sampled_from(["", "%"]))
def test_slices_agree_with_the_datasets_package(
    tmp_path_factory: pytest.TempPathFactory, start: int | None, stop: int | None, unit: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "slices"
    if not folder.exists():
        folder.mkdir()
        write_lines(folder / "train.json", rows(17))
    ends = ["" if end is None else f"{end}{unit}" for end in (start, stop)]
    split = f"train[{ends[0]}:{ends[1]}]"
    [part] = datasets.ReadInstruction.from_spec(split).to_absolute({"train": 17})
    if part.from_ < part.to:
        assert load_split(str(folder), split, COLUMNS) == rows(part.to - part.from_, part.from_)
    else:
        with pytest.raises(UserError, match="selects no row: there are 17"):
            load_split(str(folder), split, COLUMNS)


def test_other_columns_and_line_separators_inside_texts_survive(tmp_path: Path) -> None:
    content = [{"question": "a\u2028b\x85c", "answer": "é😀", "note": "kept"}]
    write_lines(tmp_path / "one.json", content)
    assert load_split(str(tmp_path), "one", COLUMNS) == content


def test_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    text = "\r\n".join(json.dumps(row) for row in rows(2)) + "\r\n"
    (tmp_path / "one.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_split(str(tmp_path), "one", COLUMNS) == rows(2)


@pytest.mark.parametrize(
    "split", ["", "array+", "a[3]", "a[1:2", "a[::2]", "a[x:]", "../a", "a[%:]", "a b", "array+-b"]
)
def test_malformed_expressions_are_refused(folder: Path, split: str) -> None:
    with pytest.raises(UserError, match=r"cannot read .*write NAME, NAME\[:N\] or NAME\[A:B\], joined by \+"):
        load_split(str(folder), split, COLUMNS)


def test_a_slice_without_rows_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'retain90\[10:\]' selects no row: there are 10, counted from 0"):
        load_split(str(folder), "forget10+retain90[10:]", COLUMNS)
    with pytest.raises(UserError, match=r"'retain90\[12:14\]' selects no row"):
        load_split(str(folder), "retain90[12:14]", COLUMNS)


def test_an_unknown_split_lists_those_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'forget05' .*the splits are: array, forget10, notes, retain90;"):
        load_split(str(folder), "forget05", COLUMNS)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the splits are: none"):
        load_split(str(tmp_path), "forget05", COLUMNS)


def test_a_missing_column_is_named_with_its_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.json", [*rows(2), {"question": "q", "reply": "a"}])
    message = "row 2, counted from 0, has no column 'answer'; its columns are: question, reply"
    with pytest.raises(UserError, match=message):
        load_split(str(tmp_path), "x", COLUMNS)
    with pytest.raises(UserError, match=message):
        load_table(str(tmp_path / "x.json"), "--data.x", COLUMNS)


@pytest.mark.parametrize(
    ("text", "line"), [('{"question": 1}\n\n{"quest', 3), ('[\n{"question": "q"},\n', 3), ("plain words", 1)]
)
def test_malformed_json_names_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=rf"x\.json line {line}: not valid JSON .*expected one object per line"):
        load_split(str(tmp_path), "x", ())


def test_rows_that_are_not_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"question": "q"}, 3]')
    with pytest.raises(UserError, match=r"x\.json row 1, counted from 0: expected a JSON object .*got int"):
        load_split(str(tmp_path), "x", ())


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"split 'x' of .* has no rows: expected at least one"):
        load_split(str(tmp_path), "x", ())


def test_a_file_instead_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--data.path .*forget10\.json: expected a folder, or OWNER/NAME"):
        load_split(str(folder / "forget10.json"), "forget10", COLUMNS)


@pytest.mark.parametrize("path", ["/no/such/place", "./nowhere", "../nowhere", "~/no-such-place", "~nobody-x/y"])
def test_a_missing_local_folder_never_asks_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(
        UserError, match=f"--data.path {path}: expected a folder, or OWNER/NAME of a data set on the hub"
    ):
        load_split(path, "forget10", COLUMNS)


def test_the_hub_is_read_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str, split: str) -> datasets.Dataset:
        assert (path, name, split) == ("someone/data", "forget10", "train")
        return datasets.Dataset.from_list(rows(5))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_split("someone/data", "forget10[1:3]", COLUMNS) == rows(2, 1)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no\nroute"),
        OSError("no route"),
        datasets.exceptions.DatasetNotFoundError("no route"),
        datasets.exceptions.DatasetGenerationError("no route"),
        ValueError("BuilderConfig 'forget10' not found: no route"),
        RuntimeError("Dataset scripts are no longer supported: no route"),
        Exception("no route"),
    ],
)
def test_hub_failures_become_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"--data\.path someone/data: .* configuration forget10, split train \(\w+: .*no route\).*configs/demo\.yaml"
    )
    with pytest.raises(UserError, match=message) as caught:
        load_split("someone/data", "forget10", COLUMNS)
    assert "\n" not in str(caught.value)


def test_programming_errors_are_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda: None)
    with pytest.raises(TypeError):
        load_split("someone/data", "forget10", COLUMNS)


def test_load_lines_drops_blank_ones(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("I don't know.\n\n  Not sure. \n", encoding="utf-8")
    assert load_lines(str(tmp_path / "x.txt")) == ["I don't know.", "Not sure."]


def test_unreadable_texts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    with pytest.raises(
        UserError, match=r"^--data.refusals: cannot read .*x\.txt \(No such file or directory\): give an existing"
    ):
        load_lines(str(file))
    with pytest.raises(UserError, match=r"^--data.x: cannot read"):
        load_table(str(file), "--data.x", COLUMNS)
    file.write_text(" \n")
    with pytest.raises(UserError, match=r"x\.txt has no text: expected one entry per line"):
        load_lines(str(file))
    file.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"x\.txt is not UTF-8 text \(byte 2\): convert it"):
        load_lines(str(file))


@pytest.mark.parametrize("bad", [{"question": "q", "answer": " "}, {"question": None, "answer": "a"}])
def test_training_rows_without_text_are_refused(bad: dict) -> None:
    with pytest.raises(UserError, match=r"forget row 3, counted from 0: expected text as (question|answer), got"):
        check_rows([*rows(3), bad], "forget")


def test_repeated_training_rows_are_refused() -> None:
    with pytest.raises(UserError, match="retain rows 1 and 3, counted from 0, have the same question and answer"):
        check_rows([*rows(3), {"question": "q1 ", "answer": "a1"}], "retain")


def test_repeated_texts_are_refused() -> None:
    check_rows(["one", "two"], "forget")
    with pytest.raises(UserError, match="forget rows 0 and 2, counted from 0, have the same text: remove one"):
        check_rows(["one", "two", "one\n"], "forget")


def test_one_question_may_have_two_answers() -> None:
    check_rows([{"question": "q", "answer": "a"}, {"question": "q", "answer": "b"}], "retain")


def test_overlap_of_forget_and_retain_is_refused() -> None:
    check_disjoint(rows(3), rows(3, start=3), "retain")
    message = "2 of 4 forget rows are also retain rows; the first is forget row 2 = retain row 1, counted from 0"
    with pytest.raises(UserError, match=message):
        check_disjoint(rows(4), [{"question": "q9", "answer": "a"}, *rows(2, start=2), *rows(1, start=2)], "retain")


@pytest.mark.skipif(SHARED is None, reason="SIMNPO_PL_SHARED is not set")
@pytest.mark.parametrize(("forget", "retain"), [("01", "99"), ("05", "95"), ("10", "90")])
def test_the_real_tofu_splits_pass_every_check(forget: str, retain: str) -> None:
    folder = f"{SHARED}/tofu"
    forget_rows = load_split(folder, f"forget{forget}", COLUMNS)
    retain_rows = load_split(folder, f"retain{retain}", COLUMNS)
    assert len(forget_rows) + len(retain_rows) == 4000
    check_rows(forget_rows, "forget")
    check_rows(retain_rows, "retain")
    check_disjoint(forget_rows, retain_rows, "retain")
    measured = {name: load_split(folder, f"{name}_perturbed", COLUMNS) for name in (f"forget{forget}", "retain")}
    for name, split in measured.items():
        check_rows(split, name)
    check_disjoint(*measured.values(), "retain")
    refusals = load_lines(f"{folder}/idontknow.jsonl")
    assert len(refusals) == 100


def test_text_of_three_formats(tmp_path: Path):
    """A list of strings, lines of objects, and a text file whose documents stand between blank lines."""
    documents = ["one\ntwo", "three\n\n", "four"]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "list.json").write_text(json.dumps(documents))
    (tmp_path / "raw" / "lines.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (tmp_path / "raw" / "plain.txt").write_text("\n\n".join(documents))
    for name in ("list", "lines", "plain"):
        assert load_split(str(tmp_path), f"raw/{name}", ("text",)) == [{"text": d} for d in documents]
    assert load_split(str(tmp_path), "raw/plain[1:]+raw/list[:1]", ("text",)) == [
        {"text": d} for d in ("three\n\n", "four", "one\ntwo")
    ]
    with pytest.raises(UserError, match=r"no split 'raw/other' .*: lines, list, plain; choose one"):
        load_split(str(tmp_path), "raw/other", ("text",))
    with pytest.raises(UserError, match=r"'raw/plain' .* row 0, .* has no column 'question'; its columns are: text"):
        load_split(str(tmp_path), "raw/plain", ("question",))
    with pytest.raises(UserError, match=r"no split 'other/x' .*the splits are: none"):
        load_split(str(tmp_path), "other/x", ("text",))
    (tmp_path / "raw" / "blank.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"split 'raw/blank' .* has no rows"):
        load_split(str(tmp_path), "raw/blank", ("text",))


def test_configuration_and_split_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"text": "t"}])
    assert load_split("muse-bench/MUSE-News", "raw/forget", ("text",)) == [{"text": "t"}]
    load_split("some/set", "forget10", ("text",))
    assert asked == [
        (("muse-bench/MUSE-News", "raw"), {"split": "forget"}),
        (("some/set", "forget10"), {"split": "train"}),
    ]
