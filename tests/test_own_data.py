"""Custom data: forms, sources, columns, what each part makes possible; every command of docs/data.md is run."""

import copy
import json
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from helpers import results
from simnpo_pl.benchmarks import OwnData
from simnpo_pl.data.columns import Columns, Records
from simnpo_pl.data.conversation import Conversation, question_and_answer
from simnpo_pl.data.sources import load_table
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.utils.errors import UserError

ROOT = Path(__file__).parents[1]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] "
    "{{ '[no thought] ' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are built in the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "data sets")


def lines(file: Path, *rows: Any) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def qa(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"What is {n}?", "answer": f"It is number {n}.", **more} for n in numbers]


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path):
    rows = [{"question": "Who, when?", "answer": 'He "A"\nthen B'}, {"question": "Ünï?", "answer": "No."}]
    lines(tmp_path / "a.jsonl", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text(
        'question,answer\n"Who, when?","He ""A""\nthen B"\nÜnï?,No.\n', encoding="utf-8-sig"
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert load_table(str(tmp_path / name), "--data.forget") == rows
    folder = tmp_path / "set"
    folder.mkdir()
    shutil.copy(tmp_path / "a.jsonl", folder / "train.jsonl")
    lines(folder / "test.jsonl", {"question": "T?", "answer": "t"})
    for name in (str(folder), f"{folder}:train"):
        assert load_table(name, "--data.forget") == rows
    assert load_table(f"{folder}:train[1:]", "--data.forget") == rows[1:]
    assert load_table(f"{folder}:default/test", "--data.forget") == [{"question": "T?", "answer": "t"}]
    (folder / "train.jsonl").unlink()
    assert len(load_table(str(folder), "--data.forget")) == 1
    (tmp_path / "t.txt").write_text("One.\n\nTwo.\n")
    assert load_table(str(tmp_path / "t.txt"), "--data.forget") == [{"text": "One."}, {"text": "Two.\n"}]


def test_csv_is_text_in_a_folder_too(tmp_path: Path):
    """Left to itself the `datasets` package makes numbers, booleans and nothing of such answers."""
    rows = [{"question": "When?", "answer": answer} for answer in ("1984", "007", "1e3", "NA", "null", "True")]
    for folder, answers in (("numbers", rows[:3]), ("names", rows[3:5]), ("all", rows)):
        (tmp_path / folder).mkdir()
        text = "".join(f"{row['question']},{row['answer']}\n" for row in answers)
        (tmp_path / folder / "train.csv").write_text("question,answer\n" + text)
        assert load_table(str(tmp_path / folder), "--data.forget") == answers
        assert load_table(f"{tmp_path / folder}:train[1:]", "--data.forget") == answers[1:]
        assert load_table(str(tmp_path / folder / "train.csv"), "--data.forget") == answers


def test_numbers_of_json_lines_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"question": "When?", "answer": 1984}\n')
    with pytest.raises(UserError, match=r"a.jsonl row 0, counted from 0: expected text as answer, got 1984"):
        Columns().read(load_table(str(tmp_path / "a.jsonl"), "--data.forget"), str(tmp_path / "a.jsonl"))


def test_a_field_longer_than_the_csv_module_takes_by_default(tmp_path: Path):
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(load_table(str(tmp_path / "a.csv"), "--data.forget")[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.jsonl", r"^--data.forget: cannot read none.jsonl \(No such file"),
        ("none.parquet", r"^--data.forget: cannot read none.parquet as parquet \(.*No such file"),
        (
            "none",
            r"--data.forget none: expected a folder, or OWNER/NAME of a data set on the hub; files end in .json, ",
        ),
        ("./none/at/all", r"--data.forget ./none/at/all: expected a folder"),
        ("{}/a.tsv", r"a.tsv: expected a file ending in .json, .jsonl, .csv, .parquet, .txt; convert it"),
        ("{}/empty.csv", r"has no rows: expected at least one"),
        ("{}/short.csv", r"short.csv line 3: expected 2 fields as in the first line"),
        ("{}/quote.csv", r"quote.csv after line 1: not valid CSV"),
        ("{}/bad.parquet", r"cannot read .*bad.parquet as parquet"),
        ("{}/splits", r"has the splits .*; name one, as in .*splits:(test|validation)"),
        ("{}/splits:dev", r"cannot load configuration default, split dev \(ValueError: Unknown split"),
        (
            "someone/Rows:train",
            r"--data.forget someone/Rows: cannot load .*, split train \(.*or give --data.forget FOLDER",
        ),
        ("hf://datasets/someone/Rows/a.jsonl", r"--data.forget: cannot download hf://datasets/someone/Rows/a.jsonl"),
        ("hf://datasets/a.jsonl", r"expected hf://datasets/OWNER/NAME/FILE"),
    ],
)
def test_unreadable_tables(tmp_path: Path, source: str, message: str):
    (tmp_path / "a.tsv").write_text("a\tb\n")
    (tmp_path / "empty.csv").write_text("question,answer\n")
    (tmp_path / "short.csv").write_text("question,answer\na,b\nc\n")
    (tmp_path / "quote.csv").write_text('question,answer\n"a"b,c\n')
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "splits").mkdir()
    for name in ("test", "validation"):
        lines(tmp_path / "splits" / f"{name}.jsonl", *qa(1))
    with pytest.raises(UserError, match=message) as error:
        load_table(source.format(tmp_path), "--data.forget")
    assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub_is_asked_for_as_named(monkeypatch: pytest.MonkeyPatch):
    """Name, configuration and split arrive at the `datasets` package; no network here."""
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(*names: Any, split: str | None) -> Any:
        asked.append((*names, split))
        found = datasets.Dataset.from_list(qa(1))
        return found if split else datasets.DatasetDict(only=found)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("owner/name", "hf://datasets/owner/name:test", "owner/name:en/train[:5%]"):
        assert load_table(source, "--data.forget") == qa(1)
    assert asked == [("owner/name", None, None), ("owner/name", None, "test"), ("owner/name", "en", "train[:5%]")]


# -- columns -----------------------------------------------------------------------------------------------------------


def test_columns_by_name():
    table = [{"q": "Who?", "a": "He.", "p": "Him.", "w": '["She.", "It."]', "question": "other", "text": "other"}]
    columns = Columns("q", "a", paraphrased_answer="p", perturbed_answer="w")
    row = {"question": "Who?", "answer": "He.", "paraphrased_answer": "Him.", "perturbed_answer": ["She.", "It."]}
    assert columns.read(table, "t") == [row]
    # Optional columns may be empty.
    assert columns.read([{**table[0], "p": None, "w": []}], "t") == [{"question": "Who?", "answer": "He."}]
    assert Columns(text="body").read([{"body": "One."}], "t") == ["One."]
    # A text column next to question and answer is ignored.
    assert Columns().read([{"question": "Q?", "answer": "A.", "text": "x"}], "t")[0]["answer"] == "A."


def test_columns_of_other_projects():
    table = [{"prompt": "Who?", "completion": "He.", "perturbed_answer": ["She."]}]
    assert Columns().read(table, "t") == [{"question": "Who?", "answer": "He.", "perturbed_answer": ["She."]}]
    table = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Go.", "input": "", "output": "Yes."},
    ]
    rows = [{"question": "Add.\n\n1 and 2", "answer": "3"}, {"question": "Go.", "answer": "Yes."}]
    assert Columns().read(table, "t") == rows
    # The project's own names win, and so do names that were given.
    assert Columns().read([{**table[0], "question": "Q?", "answer": "A."}], "t")[0]["question"] == "Q?"
    assert Columns("instruction", "input").read(table[:1], "t")[0]["answer"] == "1 and 2"


def test_records():
    records = Records("Where does {name} live, since {since}?", "In {city}.")
    table = [{"name": "Ann", "city": "Rome", "since": 1999, "paraphrased_answer": "Rome."}]
    row = {"question": "Where does Ann live, since 1999?", "answer": "In Rome.", "paraphrased_answer": "Rome."}
    assert Columns().read(table, "t", records) == [row]
    # A table without these columns is read by its own.
    assert Columns().read(qa(1), "t", records) == qa(1)
    with pytest.raises(UserError, match=r"t: no column since for --data.template_question .* columns are: name, city$"):
        Columns().read([{"name": "Ann", "city": "Rome"}], "t", records)
    with pytest.raises(
        UserError, match=r"t: expected columns name and since and city, or messages, or text; its columns"
    ):
        Columns().read([{"street": "A"}], "t", records)
    mistyped = Records("{nmae}", "{city}")
    with pytest.raises(UserError, match=r"no column nmae for .*template_answer; the nearest is name; its columns are"):
        Columns().read([{"name": "Ann", "city": "Rome"}], "t", mistyped)
    with pytest.raises(UserError, match=r"t: expected columns nmae and city, .*, or text; the nearest is name; its"):
        Columns().read([{"name": "Ann", "town": "Rome"}], "t", mistyped)
    for value in (None, " ", ["Rome"]):
        with pytest.raises(
            UserError, match=r"t row 0, counted from 0: expected a text or number as city, got .*; fix or"
        ):
            Columns().read([{"name": "Ann", "city": value, "since": 1}], "t", records)
    with pytest.raises(UserError, match=r"no column name.__class__ for"):
        Columns().read(table, "t", Records("{name.__class__}", "{city}"))


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("Where?", "{city}", r"--data.template_question 'Where\?': expected a column in braces, as in {name}"),
        ("{name", "{city}", r"--data.template_question '{name': .*; write a column as {name}"),
        ("{name}", "{}", r"--data.template_answer '{}': empty braces; write a column as {name}"),
        ("{name}", None, r"--data.template_question and --data.template_answer: give both, or neither"),
    ],
)
def test_templates_that_make_no_rows(question: str, answer: str | None, message: str):
    with pytest.raises(UserError, match=message):
        OwnData("f.jsonl", template_question=question, template_answer=answer)


def test_columns_by_source(cli_own: Callable[..., Path], tmp_path: Path):
    """Forget and retain rows use names of their own; holdout rows the common ones."""
    forget = lines(tmp_path / "f.jsonl", {"q": "Who?", "a": "He."})
    retain = lines(tmp_path / "r.jsonl", {"ask": "Where?", "say": "There.", "q": "no", "a": "no"})
    holdout = lines(tmp_path / "h.jsonl", {"x": "When?", "answer": "Now."})
    options = [
        "--data.forget",
        forget,
        "--data.retain",
        retain,
        "--data.holdout",
        holdout,
        "--data.columns.question",
        "x",
    ]
    options += ["--data.forget_columns.question", "q", "--data.forget_columns.answer", "a"]
    options += ["--data.retain_columns.question", "ask", "--data.retain_columns.answer", "say"]
    run = cli_own("test", "run", *options)
    rows = [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]
    assert [(row["split"], row["question"], row["answer"]) for row in rows] == [
        ("forget", "Who?", "He."),
        ("retain", "Where?", "There."),
        ("holdout", "When?", "Now."),
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([{"q": "a", "answer": "b"}], r"t: expected columns question and answer, or messages, or text; its columns "
         r"are: q, answer; name yours, as in --data.columns.question NAME, or for records: --data.template_question "
         r"and --data.template_answer"),
        ([{"question": "a", "answer": "b"}, {"question": "c"}], r"t row 1, counted from 0, has no column 'answer'"),
        ([{"question": "a", "answer": " "}], r"t row 0, counted from 0: expected text as answer, got ' '"),
        ([{"question": None, "answer": "b"}], r"expected text as question, got None"),
        ([{"text": 3}], r"expected text as text, got 3"),
        ([{"question": "a", "answer": "b", "perturbed_answer": "wrong"}], r"expected a list of texts as pert"),
        ([{"question": "a", "answer": "b", "perturbed_answer": ["x", ""]}], r"expected a list of texts"),
        ([{"question": "a", "answer": "b", "paraphrased_answer": ["x"]}], r"expected text as paraphrased_answer"),
        ([{"messages": "hello"}], r"expected a list of messages, got 'hello'"),
        ([{"messages": []}], r"expected a list of messages, got \[\]"),
        ([{"messages": [{"role": "user"}]}], r"expected messages with a role and a content, got"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], r"the assistant's answer, got 1 messages"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r"expected messages and then the assistant's "
         r"answer, got 1 messages with {'role': 'user', 'content': 'a'} as the last"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}], r"'content': ' '}"),
    ],
)  # fmt: skip
def test_unusable_columns(table: list[dict[str, Any]], message: str):
    with pytest.raises(UserError, match=message):
        Columns().read(table, "t")


# -- conversations -----------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "Do you know her?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Where was she born?"},
    {"role": "assistant", "content": "In Szeged."},
]


def test_conversation_in_tokens(chat_folder: Path):
    """The text is the template's; only the last answer and one end of sequence are scored."""
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    question, answer = question_and_answer(TURNS, "row")
    assert question == "user: Do you know her?\nassistant: Yes.\nuser: Where was she born?"
    row = PromptTemplate(tokenizer, system_prompt="Be brief.").encode(question, answer)
    turns = "[user] Do you know her?\n[assistant] Yes.\n[user] Where was she born?\n[assistant] "
    expected = tokenizer(f"{tokenizer.bos_token}[system] Be brief.\n{turns}In Szeged.", add_special_tokens=False)[
        "input_ids"
    ]
    assert row.input_ids == [*expected, tokenizer.eos_token_id]
    scored = [label for label in row.labels if label != -100]
    assert tokenizer.decode(scored).strip() == f"In Szeged.{tokenizer.eos_token}"
    # The conversation's own system message wins over the option.
    own, _ = question_and_answer([{"role": "system", "content": "Shout."}, *TURNS], "row")
    text = tokenizer.decode(PromptTemplate(tokenizer, system_prompt="Be brief.").encode(own, answer).input_ids)
    assert "Shout." in text
    assert "Be brief." not in text


def test_one_user_message_is_a_question(chat_folder: Path):
    question, answer = question_and_answer(TURNS[2:], "row")
    assert type(question) is str
    assert (question, answer) == ("Where was she born?", "In Szeged.")


def test_conversation_is_kept_by_copies():
    conversation = Conversation([("user", "a"), ("assistant", "b"), ("user", "c")])
    for again in (copy.deepcopy(conversation), pickle.loads(pickle.dumps(conversation))):
        assert again == conversation
        assert again.messages == conversation.messages


def test_conversations_that_no_prompt_can_be_made_of(chat_folder: Path, model_folder: Path):
    question, answer = question_and_answer(TURNS, "row")
    for folder, template in ((model_folder, None), (chat_folder, "Q: {question} A: {answer}")):
        encode = PromptTemplate(AutoTokenizer.from_pretrained(folder), template)
        with pytest.raises(UserError, match=r"forget row 0, .* a conversation needs a chat template; leave out"):
            encode.encode_rows([(question, answer)], "forget")
    question, answer = question_and_answer([{"role": "tool", "content": "x"}, *TURNS], "row")
    encode = PromptTemplate(AutoTokenizer.from_pretrained(chat_folder))
    with pytest.raises(UserError, match=r"the chat template refuses these messages \(no tools here\)"):
        encode.encode_rows([(question, answer)], "forget")


# -- what each part makes possible -------------------------------------------------------------------------------------

WRONG = {"perturbed_answer": ["It is none.", "It is all."]}


def evaluation(model: Path, **options: Any) -> Any:
    data = OwnData(model=str(model), eval=EvalOptions(cache_dir=None), **options)
    data.setup("validate")
    return data.evaluation()


def test_what_is_measured_follows_from_the_rows(model_folder: Path, tmp_path: Path):
    plain, more = lines(tmp_path / "a.jsonl", *qa(1, 2)), lines(tmp_path / "b.jsonl", *qa(3, 4, **WRONG))
    holdout = lines(tmp_path / "c.jsonl", *qa(5))
    (tmp_path / "t.txt").write_text("One sentence is here.\n\nAnother one is there.\n")
    base = {"forget/probability", "forget/rouge", "forget/extraction_strength", "forget/exact_memorization"}
    base |= {"forget/verbatim", "forget/degenerate"}
    keep = {"retain/probability", "retain/rouge", "retain/degenerate"}
    attacks = {"mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus"}

    alone = evaluation(model_folder, forget=plain)
    assert set(alone.names()) == base | {"probe/nll"}
    assert alone.unavailable["retain/rouge"] == "no retain rows; give --data.retain FILE"
    assert "have no wrong answers" in alone.unavailable["forget_quality"]
    assert alone.unavailable["mia_loss"] == "no holdout rows; give --data.holdout"

    found = evaluation(model_folder, forget=more, retain=plain, holdout=holdout, retain_eval_rows=1)
    assert set(found.names()) == base | keep | attacks | {"forget/truth_ratio"}
    assert [len(part.texts) for part in found.splits] == [2, 1, 1]
    assert {"forget_quality", "privleak"} <= set(found.unavailable)
    assert not set(found.names()) & set(found.unavailable)

    text = evaluation(model_folder, forget=str(tmp_path / "t.txt"), retain=plain, max_length=32)
    assert set(text.names()) == keep | {"forget/nll", "forget/exact_memorization", "forget/extraction_strength"}
    assert text.unavailable["forget/truth_ratio"] == "plain text has no wrong answers"
    assert len(text.splits[0].texts) == 1
    (tmp_path / "u.txt").write_text("A third is elsewhere.\n")
    rows = evaluation(model_folder, forget=str(tmp_path / "t.txt"), retain=str(tmp_path / "u.txt"), rows="documents")
    assert [row["answer"] for row in rows.splits[0].texts] == ["One sentence is here.", "Another one is there.\n"]
    assert {"retain/nll"} == {name for name in rows.names() if name.startswith("retain")}


def test_probability_and_ratio_without_a_paraphrase(cli_own: Callable[..., Path], tmp_path: Path):
    """Probability stays the answer's own; in the truth ratio the answer takes the paraphrase's place."""
    forget = lines(tmp_path / "b.jsonl", *qa(3, 4, 5, **WRONG))
    first = cli_own("test", "first", "--data.forget", forget, "--data.retain", "null")
    rows = [json.loads(line) for line in (first / "rows.jsonl").read_text().splitlines()]
    for row in (row for row in rows if row["split"] == "forget"):
        assert row["probability"] == pytest.approx(2.718281828 ** -row["answer_nll"], rel=1e-5)
        mean = sum(row["perturbed_nll"]) / 2
        assert row["truth_ratio"] == pytest.approx(2.718281828 ** (row["answer_nll"] - mean), rel=1e-5)
    again = cli_own("test", "again", "--data.forget", forget, "--data.retain", "null", "--eval.retain_log", str(first))
    assert results(again)["final"]["metrics"]["forget_quality"] == 1.0


def test_text_against_holdout_and_a_retrained_model(cli_own: Callable[..., Path], other_folder: Path, tmp_path: Path):
    """Membership inference and PrivLeak of plain text, with the retrained model's own area."""
    (tmp_path / "f.txt").write_text("\n\n".join(f"Number {n} is the answer to question {n}." for n in range(6)))
    (tmp_path / "h.txt").write_text("\n\n".join(f"Nothing is said of {n} here or there." for n in range(5)))
    options = [
        "--data.forget",
        str(tmp_path / "f.txt"),
        "--data.holdout",
        str(tmp_path / "h.txt"),
        "--data.retain",
        "null",
    ]
    options += ["--data.rows", "documents", "--eval.retrained", str(other_folder), "--eval.gradnorm", "true"]
    content = results(cli_own("test", "text", *options))
    found = content["final"]["metrics"]
    assert content["counts"]["mia_gradnorm"] == 6
    assert found["mia_min_k/m"] == 5
    assert found["privleak/retrained_auc"] == content["retrained"]["metrics"]["mia_min_k"]
    # Every token but the first is scored, the last one too: text has no end.
    rows = [json.loads(line) for line in (tmp_path / "text" / "rows.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["forget"] * 6 + ["holdout"] * 5 + ["probe"] * 40
    assert "generation" not in rows[0]


@pytest.fixture
def cli_own(run_options: list[str], chat_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Runs a command with configs/own.yaml and the options of a quick run."""
    from simnpo_pl.__main__ import main

    quick = run_options[run_options.index("--data.effective_batch") :]

    def call(command: str, name: str, *options: str) -> Path:
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        own = ["--config", str(ROOT / "configs" / "own.yaml"), "--model.name", str(chat_folder)]
        main([command, *own, *quick, *options, "--run_dir", str(tmp_path / name), "--debug"])
        return tmp_path / name

    return call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": "t.txt"}, "--data.holdout: expected the form of the forget rows"),
        ({"holdout": "a.jsonl"}, "2 of 2 forget rows are also holdout rows"),
        ({"retain": "a.jsonl"}, "2 of 2 forget rows are also retain rows; the first is forget row 0 = retain row 0"),
        ({"retain": "b.jsonl", "holdout": "b.jsonl"}, "1 of 1 retain rows are also holdout rows; the first"),
        ({"forget": "twice.jsonl"}, "forget rows 0 and 1, counted from 0, have the same question and answer"),
        ({"retain": "twice.jsonl", "retain_eval_rows": 1}, "retain rows 0 and 1, counted from 0, have the same"),
        ({"holdout": "twice.jsonl"}, "holdout rows 0 and 1, counted from 0, have the same question and answer"),
        ({"forget": "twice.txt", "rows": "documents"}, "forget rows 0 and 2, counted from 0, have the same text"),
        ({"forget": "t.txt", "holdout": "t.txt", "max_length": 8}, "2 of 2 forget rows are also holdout rows"),
        ({"retain_eval_rows": 0}, "--data.retain_eval_rows must be at least 1, or null for all, got 0"),
        ({"forget": "t.txt", "max_length": 1}, "blocks of text need at least 2 tokens"),
        ({"forget": "mixed.jsonl"}, "forget: row 1 .* has no perturbed_answer while others have"),
    ],
)
def test_mistakes(model_folder: Path, tmp_path: Path, options: dict[str, Any], message: str):
    lines(tmp_path / "a.jsonl", *qa(1, 2))
    lines(tmp_path / "mixed.jsonl", *qa(1, **WRONG), *qa(2))
    lines(tmp_path / "b.jsonl", *qa(3))
    lines(tmp_path / "twice.jsonl", *qa(4, 4))
    (tmp_path / "t.txt").write_text("One sentence is here.\n\nAnother one is there.\n")
    (tmp_path / "twice.txt").write_text("One.\n\n* * *\n\nOne.\n")
    paths = {k: str(tmp_path / v) if "." in str(v) else v for k, v in {"forget": "a.jsonl", **options}.items()}
    with pytest.raises(UserError, match=message):
        evaluation(model_folder, **paths)


def test_a_retrained_model_with_nothing_to_compare(model_folder: Path, tmp_path: Path):
    forget = lines(tmp_path / "a.jsonl", *qa(1, 2))
    data = OwnData(forget, model=str(model_folder), eval=EvalOptions(retain_log="not read"))
    with pytest.raises(UserError, match=r"nothing to compare with a retrained model: .* or --data.holdout"):
        data.setup("validate")


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "data.md").read_text()
COMMANDS = [
    command
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    for command in block.replace("\\\n", " ").strip().splitlines()
]


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_commands_of_the_page(
    run_options: list[str], chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    """Each runs on the page's own files, with the tiny model and the options of a quick run."""
    from simnpo_pl.__main__ import main

    for name, content in re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', PAGE, flags=re.S):
        (tmp_path / name).write_text(content)
    (tmp_path / "FOLDER").mkdir()
    for split, file in (("train", "forget.jsonl"), ("test", "retain.jsonl")):
        shutil.copy(tmp_path / file, tmp_path / "FOLDER" / f"{split}.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SIMNPO_PL_RUN_DIR", raising=False)
    words = [str(chat_folder) if word == "MODEL" else word for word in shlex.split(COMMANDS[number])[3:]]
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
    quick = [*run_options[run_options.index("--data.effective_batch") :], "--trainer.max_epochs", "1"]
    main([*words, *quick, "--run_dir", "run", "--debug"])
    content = results(tmp_path / "run")
    assert content["finished"]
    assert content["final"]["metrics"]["forget/exact_memorization"] >= 0
    if "--eval.mia_reference" in words:
        assert set(content["unavailable"]) == {"model_utility", "forget/fluency"}


def test_files_of_the_page_are_used():
    names = re.findall(r'title="([\w.]+)"', PAGE)
    assert len(names) >= 6
    assert all(any(name in shlex.split(command) for command in COMMANDS) for name in names)
