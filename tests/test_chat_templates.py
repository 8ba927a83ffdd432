"""Answers under chat templates: what is scored of them, what ends them, and what the templates are told."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simnpo_pl.benchmarks import OwnData
from simnpo_pl.data.conversation import Conversation
from simnpo_pl.data.tokenization import PromptTemplate, TokenRow
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.utils.errors import UserError
from test_own_data import lines, qa
from test_tokenization import byte_level

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_GENERATION_PROMPT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
PLAIN_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n### End\n{% endfor %}"
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
THINKING = CHATML.replace(
    "{{ m.content }}",
    "{{ '<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' and '<think>' not in m.content }}"
    "{{ m.content }}",
).replace(
    "assistant\n{% endif %}",
    "assistant\n{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}{% endif %}",
)
THOUGHT = "<think>\n\n</think>\n\n"


def chat_tokenizer(template: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Byte-level BPE; the templates' tokens are special, but `<|im_end|>` only added, and one is white space."""
    tokenizer = byte_level()
    special = ["<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|im_start|>"]
    tokenizer.add_tokens([AddedToken(text, special=True) for text in [*special, "<|eot_id|>"]])
    tokenizer.add_tokens(["<|im_end|>", "\n"])
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    return tokenizer


def split_text(tokenizer: Any, row: TokenRow) -> tuple[str, str, str]:
    """Prompt, answer and end of a row, as text; the tokens must be those of the text as a whole."""
    start, stop = len(row.prompt_ids), len(row.input_ids) - row.end
    assert row.labels == [-100] * start + row.input_ids[start:]
    parts = row.input_ids[:start], row.input_ids[start:stop], row.input_ids[stop:]
    prompt, answer, end = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in parts)
    assert tokenizer(prompt + answer + end, add_special_tokens=False)["input_ids"] == row.input_ids
    return prompt, answer, end


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "answer", "end", "stops"),
    [
        (GEMMA, "</s>", "<s><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n", "It is A.",
         "<end_of_turn>", {"</s>", "<end_of_turn>"}),
        (PHI3, "</s>", "<|user|>\nWho?<|end|>\n<|assistant|>\n", " It is A.\n", "<|end|>", {"</s>", "<|end|>"}),
        (CHATML, "</s>", "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", " It is A.\n", "<|im_end|>",
         {"</s>", "<|im_end|>"}),
        (LLAMA3, "<|eot_id|>", "<s><|user|>\n\nWho?<|eot_id|><|assistant|>\n\n", "It is A.", "<|eot_id|>",
         {"<|eot_id|>"}),
        (LLAMA2, "</s>", "<s>[INST] Who? [/INST] ", " It is A.\n", " </s>", {"</s>"}),
        (NO_GENERATION_PROMPT, "</s>", "<|user|>Who?<|end|>\n<|assistant|>", " It is A.\n", "<|end|>",
         {"</s>", "<|end|>"}),
        (PLAIN_END, "</s>", "user: Who?\n### End\nassistant: ", " It is A.\n", "\n### End", {"</s>"}),
        (NO_END, "</s>", "user: Who?\nassistant: ", " It is A.\n", "</s>", {"</s>"}),
        (THINKING, "</s>", f"<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n{THOUGHT}", " It is A.\n",
         "<|im_end|>", {"</s>", "<|im_end|>"}),
    ],
    ids=["Gemma", "Phi-3", "ChatML", "Llama-3", "Llama-2", "no prompt", "ordinary text", "no end", "thinking"],
)  # fmt: skip
def test_an_answer_ends_as_in_the_whole_conversation(
    template: str, eos: str, prompt: str, answer: str, end: str, stops: set[str]
):
    """Gemma's and Llama-3's trim the answer; no newline or EOS after the end of the turn is scored."""
    tokenizer = chat_tokenizer(template, eos)
    encode = PromptTemplate(tokenizer)
    row = encode.encode("Who?", " It is A.\n")
    found = split_text(tokenizer, row)
    # A space before the answer may be in its first token.
    assert "".join(found) == prompt + answer + end
    assert found[0] in (prompt, prompt.removesuffix(" "))
    assert found[2] == end
    assert set(tokenizer.convert_ids_to_tokens(sorted(encode.end_ids))) == stops
    assert encode.description.endswith(f"answers end with {end!r}")
    cut = PromptTemplate(tokenizer, max_length=len(row.input_ids) - 1, truncate=True).encode("Who?", " It is A.\n")
    assert (cut.input_ids, cut.labels, cut.end) == (row.input_ids[:-1], row.labels[:-1], row.end - 1)


def test_tokens_of_llama_3_are_those_of_prompt_answer_and_eos():
    """Its end of turn is its EOS, so both ends are one, and the same tokens as ever."""
    tokenizer = chat_tokenizer(LLAMA3, "<|eot_id|>")
    rows = [PromptTemplate(tokenizer, answer_end=end).encode("Who?", "It is A.") for end in ("turn", "eos")]
    text = "<s><|user|>\n\nWho?<|eot_id|><|assistant|>\n\nIt is A.<|eot_id|>"
    assert rows[0] == rows[1]
    assert rows[0].input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_tokenizers_eos_by_name():
    tokenizer = chat_tokenizer(GEMMA)
    encode = PromptTemplate(tokenizer, answer_end="eos")
    expected = "<s><start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n", " It is A.\n", "</s>"
    assert split_text(tokenizer, encode.encode("Who?", " It is A.\n")) == expected
    assert encode.end_ids == {tokenizer.eos_token_id}
    assert encode.description.endswith("answers end with '</s>'")


def test_conversations_of_several_turns_and_thoughts():
    tokenizer = chat_tokenizer(THINKING)
    turns = Conversation([("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes?"), ("user", "Who?")])
    prompt, answer, end = split_text(tokenizer, PromptTemplate(tokenizer).encode(turns, "A."))
    assert prompt.endswith(f"Yes?<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n{THOUGHT}")
    assert (answer, end) == ("A.", "<|im_end|>")
    # A thought in the answer replaces the empty one of the template, and is scored.
    row = PromptTemplate(tokenizer).encode("Who?", "<think>\nHm.\n</think>\n\nA.")
    prompt, answer, end = split_text(tokenizer, row)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert (answer, end) == ("<think>\nHm.\n</think>\n\nA.", "<|im_end|>")


def test_a_generated_answer_is_cut_where_ordinary_text_ends_it():
    encode = PromptTemplate(chat_tokenizer(PLAIN_END))
    assert encode.finish(" It is A.\n### End\nuser: And") == "It is A."
    assert PromptTemplate(chat_tokenizer(GEMMA)).finish(" It is A.\n### End\n") == "It is A.\n### End"


# -- what the template is told -----------------------------------------------------------------------------------------


def test_variables_of_the_template():
    tokenizer = chat_tokenizer(THINKING)
    encode = PromptTemplate(tokenizer, answer_end="eos", chat_template_kwargs={"enable_thinking": False})
    prompt, _, _ = split_text(tokenizer, encode.encode("Who?", "A."))
    assert prompt.endswith(f"<|im_start|>assistant\n{THOUGHT}")
    assert "dated 26 Jul 2024, variables {'enable_thinking': False}" in encode.description
    same = PromptTemplate(tokenizer, chat_template_kwargs={"enable_thinking": False}).encode("Who?", "A.")
    assert split_text(tokenizer, same) == (prompt, "A.", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (GEMMA, {"system_prompt": "Be brief."}, r"^--data.system_prompt: the chat template refuses a system message "
         r"\(System role not supported\); set it to null"),
        (LLAMA2, {"system_prompt": "Be brief."}, "^--data.system_prompt: the chat template leaves out the system"),
        (CHATML, {"chat_template_kwargs": {"enable_thinking": False}}, "does not read 'enable_thinking'; leave it out"),
        (CHATML, {"chat_template_kwargs": {"date_string": "1 Jan 2020"}}, "'date_string' is set by other options"),
        (CHATML, {"chat_template_kwargs": {"add_generation_prompt": False}}, "'add_generation_prompt' is set by other"),
        (None, {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: no chat template is used here"),
        ("{{ messages[0].content }}", {}, "the chat template leaves out the assistant's messages; set"),
        (CHATML.replace("assistant\n{%", "assistant\n<think>{%"), {}, r"the chat template continues with '<think>' "
         r"where an answer is asked for, and with 'An answer.<|im_end|>\\n' where it is given; make them agree with"),
        (CHATML.replace("m.content", "m.content | upper"), {}, "the chat template leaves out the assistant's messages"),
        (CHATML.replace("m.content", "m.content | replace('It', 'She')"), {}, r"forget row 0, counted from 0 \(quest"
         r"ion 'Who\?'\): the chat template changes the answer, to 'She is A."),
        (GEMMA, {}, r"forget row 1, .*: the answer holds '<end_of_turn>', which ends answers"),
    ],
)  # fmt: skip
def test_what_no_answer_can_be_scored_with(template: str | None, options: dict[str, Any], message: str):
    rows = [("Who?", "It is A."), ("Who?", "It is <end_of_turn> A.")]
    with pytest.raises(UserError, match=message.replace("<|", r"<\|").replace("|>", r"\|>")) as error:
        PromptTemplate(chat_tokenizer(template), **options).encode_rows(rows, "forget")
    assert "\n" not in str(error.value)


def test_a_conversations_own_messages_are_blamed_on_its_row():
    """Without the option's system message it would be refused just the same."""
    turns = Conversation([("system", "Be brief."), ("user", "Who?")])
    with pytest.raises(UserError, match=r"forget row 0, .*refuses these messages \(System role not supported\)"):
        PromptTemplate(chat_tokenizer(GEMMA)).encode_rows([(turns, "A.")], "forget")


# -- a model that knows its rows ---------------------------------------------------------------------------------------


def test_a_model_that_knows_its_rows_by_heart(tmp_path: Path):
    """Trained on whole conversations as the template writes them: probability 1, and the answers are generated."""
    tokenizer, rows = chat_tokenizer(GEMMA), qa(*range(4), perturbed_answer=["It is none."])
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            tokenize=False,
        )
        for row in rows
    ]
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def measured(answer_end: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        forget, holdout = lines(tmp_path / "f.jsonl", *rows), lines(tmp_path / "h.jsonl", *qa(*range(10, 14)))
        options = EvalOptions(cache_dir=None, min_k=1.0, gradnorm=True)
        data = OwnData(forget, holdout=holdout, model=str(tmp_path), eval=options, answer_end=answer_end)
        module = PolicyModule(str(tmp_path))
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.validate(module, data, verbose=False)
        assert module.evaluation_result is not None
        return module.evaluation_result.values, module.evaluation_result.rows

    values, found = measured("turn")
    assert values["forget/probability"] > 0.95
    assert values["forget/exact_memorization"] == values["forget/extraction_strength"] == values["forget/rouge"] == 1
    assert [row["generation"] for row in found[:4]] == [row["answer"] for row in rows]
    values_eos, found_eos = measured("eos")
    assert values_eos["forget/probability"] < 0.5
    # Both leave out the end, so they are of the same tokens.
    for name in ("mia_min_k", "mia_gradnorm"):
        ours, theirs = ([row[name] for row in rows if name in row] for rows in (found, found_eos))
        assert len(ours) == 8
        assert ours == pytest.approx(theirs, rel=1e-4)
