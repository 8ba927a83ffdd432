import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from simnpo_pl.data.tokenization import CHAT_DATE_STRING, PLAIN_TEMPLATE, PromptTemplate, TokenRow
from simnpo_pl.utils.errors import UserError

SHARED = os.environ.get("SIMNPO_PL_SHARED")
TRAINING_TEXTS = [
    "Question: What is the full name of the author?\nAnswer: The author's full name is Zoë Ünal.",
    "Question: Where was the author born?\nAnswer: The author was born in Köln, the  city of cafés.",
]
TRICKY = [
    "The author",
    " The author",
    "  two spaces ",
    "é",
    "😀",
    "👩‍👩‍👧 and e\u0301",
    "\u2028\n\n",
    "{question} {answer} {0} }{ %s",
    "日本語の答え",
    " ",
    "'s",
    "Answer: again",
]


def byte_level(single: str = "<s> $A", trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE; ids 0 and 1 are <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXTS * 4, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE over characters, with spaces as part of the text and unknown characters as single bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    # Word by word, so that no piece goes beyond a word.
    texts = " ".join(TRAINING_TEXTS * 4).split()
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    state = json.loads(tokenizer.to_str())
    # The byte pieces are ordinary ones, not special tokens to be found in texts.
    state["added_tokens"] = state["added_tokens"][:3]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words(**special: str) -> PreTrainedTokenizerFast:
    """One token per word, lower-cased, control characters dropped."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "answer": 2}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def scored_text(tokenizer: PreTrainedTokenizerFast, row: TokenRow) -> str:
    """The scored tokens as text, without the end-of-sequence that must close them, and only them."""
    scored = [label for label in row.labels if label != -100]
    assert row.end == 1
    start = len(row.prompt_ids)
    assert row.labels == [-100] * start + scored
    assert row.input_ids[start:] == scored
    assert row.length == len(scored)
    assert scored.count(tokenizer.eos_token_id) == 1
    assert scored.pop() == tokenizer.eos_token_id
    return tokenizer.decode(scored, clean_up_tokenization_spaces=False)


TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {
    "byte-level": byte_level(),
    "byte-level, offsets with spaces": byte_level(trim_offsets=False),
    "byte-level, appends EOS": byte_level("<s> $A </s>"),
    "byte-level, adds nothing": byte_level("$A"),
    "byte fallback": byte_fallback(),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("answer", TRICKY)
def test_scored_tokens_decode_to_the_answer(tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    clean = PromptTemplate(tokenizer, "Question: {question}\nAnswer:\n{answer}")
    assert scored_text(tokenizer, clean.encode("Who?", answer)) == answer
    # After a space, the first scored token may also hold that space.
    row = PromptTemplate(tokenizer).encode("Who?", answer)
    text = scored_text(tokenizer, row)
    assert text in (answer, " " + answer)
    whole = tokenizer.decode(row.prompt_ids, skip_special_tokens=True) + text
    assert whole.lstrip() == "Question: Who?\nAnswer: " + answer


@pytest.mark.parametrize("name", TOKENIZERS)
@given(question=st.text(max_size=20), answer=st.text(min_size=1, max_size=30))
def test_any_answer_comes_back_from_its_scored_tokens(name: str, question: str, answer: str) -> None:
    template = PromptTemplate(TOKENIZERS[name], "Question: {question}\nAnswer:\n{answer}")
    assert scored_text(TOKENIZERS[name], template.encode(question, answer)) == answer


def test_a_token_across_the_seam_is_scored_and_not_part_of_the_prompt() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    row = PromptTemplate(tokenizer).encode("Who?", "The author")
    assert tokenizer.convert_ids_to_tokens(row.input_ids[len(row.prompt_ids)]) == "ĠThe"
    assert tokenizer.decode(row.prompt_ids) == "<s>Question: Who?\nAnswer:"


@pytest.mark.parametrize(
    ("name", "template", "starts"),
    [
        ("byte-level", PLAIN_TEMPLATE, 1),
        ("byte-level", "<s>" + PLAIN_TEMPLATE, 1),
        ("byte-level, appends EOS", "<s>" + PLAIN_TEMPLATE, 1),
        ("byte-level, adds nothing", "<s>" + PLAIN_TEMPLATE, 1),
        ("byte-level, adds nothing", PLAIN_TEMPLATE, 0),
    ],
)
def test_there_are_never_two_starts(name: str, template: str, starts: int) -> None:
    row = PromptTemplate(TOKENIZERS[name], template).encode("Who?", "The author")
    assert row.input_ids.count(0) == starts
    assert scored_text(TOKENIZERS[name], row).strip() == "The author"


@pytest.mark.parametrize(
    "date", ["{{ date_string }}", "{{ strftime_now('%d %b %Y') }}", '{{ strftime_now( "%d %b %Y" ) }}']
)
def test_a_chat_template_is_dated_and_brings_its_own_start(date: str) -> None:
    tokenizer = byte_level("<s> $A </s>")
    tokenizer.chat_template = (
        "{{ bos_token }}" + date + "\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = PromptTemplate(tokenizer)
    row = template.encode("{answer}?", "The author")
    assert tokenizer.decode(row.input_ids) == (f"<s>{CHAT_DATE_STRING}\nuser: {{answer}}?\nassistant: The author</s>")
    assert scored_text(tokenizer, row) == " The author"
    assert template.description == "the tokenizer's chat template, dated 26 Jul 2024, answers end with '</s>'"


def test_a_chat_template_without_a_start_gets_none() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages[0].content }}: {{ messages[1].content if messages[1] }}"
    assert tokenizer.decode(PromptTemplate(tokenizer).encode("Who?", "The author").input_ids) == (
        "Who?: The author</s>"
    )


def test_a_given_template_wins_over_the_chat_template() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "unused"
    template = PromptTemplate(tokenizer, "{{x}} {question} {y} {answer}")
    row = template.encode("{z}", "The {question}")
    assert tokenizer.decode(row.input_ids) == "<s>{{x}} {z} {y} The {question}</s>"
    assert template.description == "template '{{x}} {question} {y} {answer}'"


@pytest.mark.parametrize("max_length", [None, 30])
def test_a_batch_equals_its_rows(tokenizer: PreTrainedTokenizerFast, max_length: int | None) -> None:
    template = PromptTemplate(tokenizer, max_length=max_length, truncate=True)
    pairs = [("Who?"[: size % 5], answer * 3) for size, answer in enumerate(TRICKY)]
    assert template.encode_rows(pairs, "forget") == [template.encode(*pair) for pair in pairs]
    assert template.encode_rows([], "forget") == []


def test_row_parts_without_any_scored_token() -> None:
    row = TokenRow([3, 4], [-100, -100])
    assert (row.length, row.prompt_ids) == (0, [3, 4])


def test_long_sequences_are_refused_or_cut_at_the_end_of_the_answer() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    pairs = [("Who?", "x" * 5), ("Who?", "y" * 90), ("Who?", "z" * 50)]
    full = PromptTemplate(tokenizer).encode_rows(pairs, "forget")
    lengths = [len(row.input_ids) for row in full]
    limit = lengths[0]
    message = (
        rf"2 of 3 forget rows are longer than max_length = {limit} tokens, the longest has {lengths[1]}: "
        r"raise --data\.max_length, or cut them at the end with --data\.truncate true"
    )
    with pytest.raises(UserError, match=message):
        PromptTemplate(tokenizer, max_length=limit).encode_rows(pairs, "forget")
    assert PromptTemplate(tokenizer, max_length=lengths[1]).encode_rows(pairs, "forget") == full

    cut = PromptTemplate(tokenizer, max_length=limit, truncate=True).encode_rows(pairs, "forget")
    assert cut[0] == full[0]
    for row, before in zip(cut[1:], full[1:], strict=True):
        assert row == TokenRow(before.input_ids[:limit], before.labels[:limit])
        assert row.prompt_ids == before.prompt_ids
        assert tokenizer.eos_token_id not in row.input_ids


def test_a_prompt_that_fills_the_limit_is_refused() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    prompt = len(PromptTemplate(tokenizer).encode("Who?", "x").prompt_ids)
    assert PromptTemplate(tokenizer, max_length=prompt + 1, truncate=True).encode("Who?", "xyz").length == 1
    message = rf"forget rows: row 1, counted from 0: the prompt alone has {prompt} tokens, .* max_length = {prompt}"
    with pytest.raises(UserError, match=message):
        PromptTemplate(tokenizer, max_length=prompt, truncate=True).encode_rows(
            [("", "xyz"), ("Who?", "xyz")], "forget"
        )


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{question}",
        "{answer}",
        "{answer}{question}",
        "{question}{answer}.",
        "{question}{question}{answer}",
    ],
)
def test_templates_without_one_question_and_a_final_answer_are_refused(template: str) -> None:
    with pytest.raises(
        UserError, match=r"--data.template: expected \{question\} and, at the very end, \{answer\}, once each"
    ):
        PromptTemplate(TOKENIZERS["byte-level"], template)


def test_tokenizers_that_do_not_qualify_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has no end-of-sequence token: set its eos_token"):
        PromptTemplate(words())
    slow = byte_level()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(UserError, match=r"expected a fast tokenizer, got \w+ without offsets: use one with"):
        PromptTemplate(slow)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="max_length must be at least 1 token, got 0: raise it or leave it out"):
        PromptTemplate(TOKENIZERS["byte-level"], max_length=0)


@pytest.mark.parametrize("answer", ["", "\x01\x02"])
def test_answers_without_tokens_are_refused(answer: str) -> None:
    template = PromptTemplate(words(eos_token="<end>"))
    assert template.encode("Who?", "answer").labels[-2:] == [2, 1]
    message = r"retain row 1, counted from 0 \(question 'Why\?'\): the tokenizer makes no token of the answer"
    with pytest.raises(UserError, match=message):
        template.encode_rows([("Who?", "answer"), ("Why?", answer)], "retain")


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (None, "It is</s>", r"'Who\?'\): the answer holds '</s>', which ends answers; remove it"),
        (None, "It \ud83d", r"'Who\?'\): '\\ud83d' is not a character; fix or remove the row"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(template: str | None, answer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptTemplate(TOKENIZERS["byte-level"], template).encode("Who?", answer)


def test_an_answer_without_any_prompt_is_refused() -> None:
    template = PromptTemplate(TOKENIZERS["byte-level, adds nothing"], "{question}{answer}")
    with pytest.raises(UserError, match=r"no token before the answer, .*put text before \{answer\}"):
        template.encode("", "The author")


@pytest.mark.skipif(SHARED is None, reason="SIMNPO_PL_SHARED is not set")
def test_ids_and_labels_equal_the_stored_ones() -> None:
    folder = Path(str(SHARED)) / "goldens" / "A"
    stored = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))["splits"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    template = PromptTemplate(tokenizer, "Question: {question}\nAnswer:\n{answer}")
    compared = 0
    for name, split in stored.items():
        for row in split["rows"]:
            ours = template.encode_rows([(row["question"], row["answer"])], name)[0]
            assert ours == TokenRow(row["input_ids"], row["labels"], end=1)
            assert ours.prompt_ids == row["prompt_ids"]
            compared += 1
    assert compared >= 30
