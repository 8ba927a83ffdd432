"""Exported folders: they hold the model that the final metrics are of, for other libraries and other users, too."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers import results
from simnpo_pl.data.tokenization import PromptTemplate
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.plan import Split
from simnpo_pl.metrics.answers import RowMean
from simnpo_pl.models.loading import context_length, load_causal_lm, load_tokenizer, model_shapes, save_model
from simnpo_pl.models.lora import LoraOptions, add_adapter
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.runs.card import write_card
from simnpo_pl.runs.export import ExportModel, ExportOptions
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.quantize import quantize
from simnpo_pl.utils.errors import UserError

CLI = Callable[..., None]
LORA = ("--model.lora.rank", "4", "--model.lora.alpha", "8")
HALF = ("--model.dtype", "bfloat16")
ADAPTER = ("--export.adapter", "true")
BEST = ("--export.best", "forget/probability", "--export.mode", "min")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIXED = ("--trainer.precision", "bf16-mixed")


@pytest.fixture(scope="module")
def small_folder(make_model: Callable[..., Path]) -> Path:
    """A model of one layer whose head is tied to its embeddings."""
    return make_model(0, num_hidden_layers=1, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "options",
    [
        (*MIXED, *BEST),
        (*LORA, *BEST),
        (*LORA, *ADAPTER),
        (*LORA, *HALF, *ADAPTER),
        (*LORA, *HALF, *BEST),
    ],
    ids=lambda options: " ".join(option.rsplit(".", 1)[-1] for option in options),
)
def test_final_metrics_are_those_of_the_folder(cli: CLI, small_folder: Path, tmp_path: Path, options: tuple[str, ...]):
    """To the last bit: the folder is evaluated again by `test`. The model is tied, and the best epoch is the first."""
    run, again = tmp_path / "run", tmp_path / "again"
    quick = ("--eval.generate_rows", "0", "--eval.start", "false", "--trainer.logger", "false")
    epochs = ("--trainer.max_epochs", "2" if BEST[0] in options else "1")
    cli("fit", "--model.name", str(small_folder), *quick, *epochs, *options, "--run_dir", str(run))
    model = [*(HALF if "bfloat16" in options else ()), *(MIXED if "bf16-mixed" in options else ())]
    cli("test", "--model.name", str(run / "model"), *quick, *model, "--run_dir", str(again))
    final = results(run)["final"]["metrics"]
    assert results(again)["final"]["metrics"] == final
    assert results(run)["exported_epoch"] == 1
    first = results(run)["epochs"][0]["metrics"]["forget/probability"]
    assert final["forget/probability"] == pytest.approx(first, rel=0.05)


def test_the_start_model_is_no_epoch(cli: CLI, small_folder: Path, tmp_path: Path):
    """Lightning evaluates it as a check before the first step; no epoch is better by this metric."""
    quick = ("--eval.generate_rows", "0", "--eval.start", "false", "--eval.final", "false", "--trainer.max_epochs", "1")
    options = (*quick, *BEST, "--trainer.num_sanity_val_steps", "-1")
    cli("fit", "--model.name", str(small_folder), *options, "--run_dir", str(tmp_path))
    start, exported = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (small_folder, tmp_path / "model"))
    assert not torch.equal(start["model.norm.weight"], exported["model.norm.weight"])


@pytest.fixture
def adapted(model_folder: Path) -> Callable[..., Any]:
    """Makes models with an adapter that is not at its start, where it would change nothing."""

    def make(dtype: str = "float32", folder: Path = model_folder, **options: Any) -> Any:
        model = load_causal_lm(str(folder), dtype)
        add_adapter(model, LoraOptions(rank=4, alpha=8.0, **options))
        generator = torch.Generator().manual_seed(3)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.3, generator=generator)
        return model.eval()

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).reshape(2, 10)).logits.float()


def test_adapter_folder_is_what_was_trained(adapted: Callable[..., Any], model_folder: Path, tmp_path: Path):
    """By transformers and by peft, on a base in half precision too, which merging would round."""
    model, tokenizer = adapted(), load_tokenizer(str(model_folder))
    model.generation_config.max_new_tokens = 7
    save_model(model, tokenizer, tmp_path / "full", merge=False)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "full")), logits(model))
    saved = json.loads((tmp_path / "full" / "generation_config.json").read_text())
    assert saved["max_new_tokens"] == 7
    assert context_length(str(tmp_path / "full")) == 256
    full, base = (model_shapes(str(folder)).num_parameters() for folder in (tmp_path / "full", model_folder))
    assert full == base
    assert AutoTokenizer.from_pretrained(tmp_path / "full").get_vocab() == tokenizer.get_vocab()
    half = adapted("bfloat16")
    save_model(half, tokenizer, tmp_path / "half", merge=False)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    ours, merged = (load_causal_lm(str(tmp_path / "half"), "bfloat16", merge=merge) for merge in (False, True))
    assert torch.equal(logits(loaded), logits(half))
    assert torch.equal(logits(ours), logits(half))
    assert not torch.equal(logits(merged), logits(half))


def test_adapter_beside_its_base_is_not_changed(adapted: Callable[..., Any], tmp_path: Path):
    """Training or rounding its weights would leave the adapter as it is."""
    save_model(adapted("bfloat16"), None, tmp_path / "half", merge=False)
    model = load_causal_lm(str(tmp_path / "half"), "bfloat16")
    for change in (lambda: quantize(model, 8), lambda: add_adapter(model, LoraOptions())):
        with pytest.raises(UserError, match=r"the adapter is not merged, .* give --model\.dtype float32"):
            change()
    with pytest.raises(UserError, match=r"--model\.name: the adapter is not merged"):
        UnlearningModule(str(tmp_path / "half"), dtype="bfloat16").configure_model()


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_adapter_on_tied_weights(
    adapted: Callable[..., Any], small_folder: Path, model_folder: Path, tmp_path: Path, layer: str
):
    """Merged into tied weights it would change both layers: refused; into weights of its own it is exported."""
    with pytest.raises(UserError, match=rf"--model.lora.target_modules: .*{layer} shares its weights"):
        adapted(folder=small_folder, target_modules=[layer, "q_proj"])
    model = adapted(target_modules=[layer, "q_proj"])
    save_model(model, None, tmp_path / "adapter", merge=False)
    save_model(model, None, tmp_path / "merged")
    for folder in ("adapter", "merged"):
        torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / folder))), logits(model), rtol=1e-4, atol=1e-4)
    # An adapter of another project.
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(model_folder), str(small_folder)))
    with pytest.raises(UserError, match=rf"--model.name: .*{layer} shares its weights"):
        load_causal_lm(str(tmp_path / "adapter"))


def test_adapter_whose_base_has_moved(adapted: Callable[..., Any], tmp_path: Path):
    save_model(adapted(), None, tmp_path / "adapter", merge=False)
    config = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(config.read_text())
    for base in ("../models/base", None):
        config.write_text(json.dumps(content | {"base_model_name_or_path": base}))
        for load in (load_causal_lm, context_length):
            with pytest.raises(
                UserError, match=rf"adapter of the base model '{base}', .*; set base_model_name_or_path"
            ):
                load(str(tmp_path / "adapter"))


def test_every_file_follows_the_umask(adapted: Callable[..., Any], model_folder: Path, tmp_path: Path):
    """Another user can serve the model where the umask lets others read."""
    tokenizer = load_tokenizer(str(model_folder))
    for umask, mode in ((0o022, 0o644), (0o027, 0o640)):
        folder = tmp_path / oct(mode)
        before = os.umask(umask)
        try:
            save_model(load_causal_lm(str(model_folder)), tokenizer, folder / "whole")
            save_model(adapted(), tokenizer, folder / "merged")
            save_model(adapted(), tokenizer, folder / "adapter", merge=False)
        finally:
            os.umask(before)
        modes = {file.name: file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}
        assert {"model.safetensors", "adapter_model.safetensors", "tokenizer.json", "config.json"} <= modes.keys()
        assert set(modes.values()) == {mode}, modes


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "scaled": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_transformers_4_finds_its_names(model_folder: Path, tmp_path: Path, rope: str):
    """Settings stand under their names of version 4, too (seen to give the same loss in 4.45.1); 5 reads the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, rope_parameters=dict(ROPES[rope]), **sizes)).eval()
    tokenizer = load_tokenizer(str(model_folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    save_model(model, tokenizer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["rope_theta"] == ROPES[rope]["rope_theta"]
    scaling = {name: value for name, value in ROPES[rope].items() if name != "rope_theta"}
    assert config.get("rope_scaling") == (scaling if rope == "scaled" else None)
    assert config["torch_dtype"] == config["dtype"] == "float32"
    told = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["additional_special_tokens"] == ["<|user|>"]
    assert told["chat_template"] == tokenizer.chat_template
    again = AutoConfig.from_pretrained(tmp_path / "model")
    assert again.rope_parameters == model.config.rope_parameters
    loaded, read = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert torch.equal(logits(loaded), logits(model))
    assert type(read) is type(tokenizer)
    for name in ("special_tokens_map", "all_special_tokens", "chat_template"):
        assert getattr(read, name) == getattr(tokenizer, name)
    assert read("<|user|>Where is it?") == tokenizer("<|user|>Where is it?")


RECORD: dict[str, Any] = {
    "seed": 3,
    "exported_epoch": 10,
    "versions": {"torch": "2.13.0"},
    "settings": {
        "model": {"name": "org/start", "lr": 1e-5},
        "data": {"init_args": {"forget_split": "forget10", "path": "org/data"}},
    },
    "objective": {
        "name": "SimNPO",
        "settings": {"beta": 2.5},
        "forget_weight": 0.125,
        "retain_loss": "NLL",
        "retain_weight": 1.0,
    },
    "counts": {"forget/probability": 6},
    "start": {"metrics": {"forget/probability": 0.99}},
    "final": {"metrics": {"forget/probability": 0.2, "forget/rouge": float("nan")}},
    "relearn": {"all": {"repeats": [{"epochs": [{"metrics": {"forget/probability": p}} for p in (0.2, 0.5, 0.4)]}]}},
    "verdict": {
        "category": "partly forgotten",
        "reasons": ["47 of 200 answers are still given word for word"],
        "untested": ["rounded weights", "sampled answers"],
        "advice": [],
    },
}


def card_of(folder: Path, **changes: Any) -> ModelCard:
    (folder / "model").mkdir(parents=True)
    write_card(Run(folder.name, folder, {**RECORD, **changes}))
    return ModelCard.load(folder / "model" / "README.md")


def test_model_card_as_the_hub_reads_it(tmp_path: Path):
    """Without network: the start model's own card is not found."""
    card = card_of(tmp_path / "run", label="ours")
    assert card.data.base_model == "org/start"
    assert card.data.license is None
    assert (card.data.library_name, card.data.datasets) == ("transformers", ["org/data"])
    assert card.data.tags == ["unlearning", "simnpo", "simnpo_pl"]
    (found,) = card.data.eval_results
    assert (found.metric_type, found.metric_value, found.dataset_type) == ("forget/probability", 0.2, "org/data")
    assert card.data.model_name == "ours"
    for text in (
        "# ours",
        "SimNPO (beta 2.5; forget weight 0.125, retain weight 1 (NLL)) was applied to 6 rows of forget10",
        "starting from the model org/start, with learning rate 1e-05 and seed 3. It is the model after epoch 10.",
        "## Verdict: partly forgotten\n\n* 47 of 200 answers are still given word for word",
        "| metric | unlearned | start |\n|---|---|---|\n| forget prob. | 0.2 | 0.99 |",
        "* relearning, forget prob. 0.5",
        "Not tested: rounded weights; sampled answers.",
        "torch 2.13.0.",
        "Metrics of greedy answers do not prove",
    ):
        assert text in card.text
    sampled = card_of(tmp_path / "sampled", settings={**RECORD["settings"], "eval": {"temperature": 0.7}})
    assert "Metrics of answers sampled at temperature 0.7 do not prove" in sampled.text


def test_model_card_of_a_fine_tuned_model(tmp_path: Path):
    tuned = {"objective": {**RECORD["objective"], "name": "FineTune"}, "verdict": None, "relearn": {}}
    card = card_of(tmp_path / "run", **tuned)
    assert card.data.tags == ["finetune", "simnpo_pl"]
    assert "| metric | fine-tuned | start |" in card.text
    assert not re.search("unlearn|removed|not tested", card.text.lower())


def test_model_card_counts_the_rows_that_were_trained_on(tmp_path: Path):
    """Not those that were measured; without either number it names none."""

    def applied(name: str, counts: dict[str, int], **given: Any) -> str:
        settings = {**RECORD["settings"], "data": {"init_args": given}}
        card = card_of(tmp_path / name, settings=settings, counts=counts)
        assert "None" not in str(card).split("after epoch")[0]
        return card.text.split("applied to ")[1].split(",")[0]

    six, forget10 = {"forget/probability": 6}, {"forget_split": "forget10"}
    assert applied("all", six, **forget10) == "6 rows of forget10"
    assert applied("chosen", six, **forget10, forget_rows=[0, 1, 2, 3]) == "4 rows of forget10"
    assert applied("other", six, **forget10, train_split="forget05") == "the rows of forget05"
    assert applied("part", six, **forget10, forget_eval_split="forget10_perturbed[:6]") == "the rows of forget10"
    assert applied("text", {"forget/nll": 4}, forget="org/text") == "the rows of forget"
    (tmp_path / "blocks").mkdir()
    lines = [json.dumps({"index": i, "epoch": epoch}) for epoch in (1, 2) for i in range(3)]
    (tmp_path / "blocks" / "weights.jsonl").write_text("\n".join(lines))
    assert applied("blocks", {}, forget="org/text") == "3 rows of forget"


@pytest.mark.parametrize(
    ("metric", "mode", "said"),
    [
        (
            "forget/probability",
            "max",
            "forget/probability: the retrained model's value is best, but --export.mode is max",
        ),
        ("forget/extraction_strength", "max", "strength: the smallest value is best, but --export.mode is max"),
        ("retain/probability", "min", "retain/probability: the largest value is best, but --export.mode is min"),
        ("retain/probability", "max", None),
        ("forget/extraction_strength", "min", None),
        ("forget/mine", "max", None),
    ],
)
def test_a_best_value_that_is_none_is_told(metric: str, mode: Any, said: str | None, recwarn: pytest.WarningsRecorder):
    rows = RowMean("nll", 1)
    split = Split(metric.split("/")[0], [{"question": "q", "answer": "a"}], [], {metric: rows})
    trainer: Any = SimpleNamespace(check_val_every_n_epoch=1, max_epochs=1)
    export = ExportModel(Path(), ExportOptions(best=metric, mode=mode))
    export.check(trainer, SimpleNamespace(lora=None), Evaluation([split], {}, {}, str))
    assert [said in str(warning.message) for warning in recwarn] == ([] if said is None else [True])


def test_model_card_reads_the_hub_s_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A license comes from a card that is on this machine already; the network is not asked, even where it is there."""
    import huggingface_hub.file_download as hub

    asked: list[Any] = []
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address))
    assert card_of(tmp_path / "bare").data.license is None
    start = tmp_path / "cache" / "models--org--start"
    for file, text in (("refs/main", "abc"), ("snapshots/abc/README.md", "---\nlicense: mit\n---\n# start\n")):
        (start / file).parent.mkdir(parents=True)
        (start / file).write_text(text)
    assert card_of(tmp_path / "known").data.license == "mit"
    assert asked == []


def test_model_card_of_a_local_start_model(tmp_path: Path):
    """License and base come from the folder's own card; no path of this machine is published."""
    base = tmp_path / "private" / "start"
    base.mkdir(parents=True)
    settings = {"model": {"name": str(base), "lr": 1e-5}, "data": {"init_args": {"forget": str(tmp_path / "f.jsonl")}}}
    bare = card_of(tmp_path / "bare", settings=settings, verdict=None, relearn={}, final=None)
    assert (bare.data.base_model, bare.data.license, bare.data.datasets) == (None, None, None)
    assert bare.data.eval_results is None
    assert "Not tested: relearning; rounded weights; sampled answers." in bare.text
    (base / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/base\n---\n# start\n")
    known = card_of(tmp_path / "known", settings=settings)
    assert (known.data.base_model, known.data.license) == ("org/base", "apache-2.0")
    assert "starting from the model in the folder start, with" in known.text
    assert "from_pretrained" not in known.text
    assert str(tmp_path) not in bare.content + known.content
    # A relative path that is not there from here.
    gone = card_of(tmp_path / "gone", settings={**settings, "model": {"name": "../start", "lr": 1e-5}})
    assert gone.data.base_model is None
    assert "the model in the folder start, with" in gone.text


@pytest.mark.parametrize(
    ("chat_template", "options", "row"),
    [
        (None, {}, {"question": "Who are you?", "answer": "It is A."}),
        (None, {"template": "Q{x}: {question} \nA: {answer}"}, {"question": "Who are you?", "answer": "It is A."}),
        (CHATML, {"template": "'{question}' {answer}"}, {"question": "Who are you?", "answer": "It is A."}),
        (CHATML, {}, {"question": "Who are you?", "answer": "It is A."}),
        (
            "{% if dated %}{{ date_string }} {% endif %}" + CHATML,
            {"system_prompt": "Be 'brief'.", "chat_template_kwargs": {"dated": True}, "chat_date": "01 May 2026"},
            {"question": "Who are you?", "answer": "It is A."},
        ),
        (CHATML, {}, {"question": "Once upon", "answer": "Once upon a time there was a river."}),
    ],
    ids=["plain", "own template", "own before chat", "chat", "chat with all options", "text"],
)
def test_the_card_s_code_asks_in_the_form_of_training(
    chat_template: str | None,
    options: dict[str, Any],
    row: dict[str, str],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """It runs as it is written, and the model reads the tokens before an answer's first."""
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(tmp_path / "model", save_jinja_files=False)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    given = {"chat_date": "26 Jul 2024", "chat_template_kwargs": None, "system_prompt": None, "template": None}
    settings = {"model": {"name": "org/start", "lr": 1e-5}, "data": {"init_args": given | options}}
    write_card(Run("run", tmp_path, {**RECORD, "settings": settings}))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "model" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "model")
    made: dict[str, Any] = {}
    exec(code, made)
    assert capsys.readouterr().out
    if row["question"] == "Once upon":
        expected = tokenizer("Once upon a time")["input_ids"]
    else:
        named = {"chat_date": "date"}
        encode = PromptTemplate(tokenizer, **{named.get(name, name): value for name, value in options.items()})
        expected = encode.encode(**row).prompt_ids
    assert made["inputs"].tolist() == [expected]
