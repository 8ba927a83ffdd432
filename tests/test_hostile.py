"""Hostile and broken input: each is refused with a clear message or handled right; none gives a silent wrong number."""

import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import results
from simnpo_pl.models import loading as models
from simnpo_pl.models.loading import load_causal_lm, load_tokenizer
from simnpo_pl.utils.errors import UserError

CLI = Callable[..., None]
Error = Callable[..., str]
ROOT = Path(__file__).parents[1]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


HOSTILE = script("hostile")


@pytest.mark.parametrize("name", HOSTILE.PROPERTIES)
def test_properties(name: str):
    """What `scripts/hostile.py` tries by the thousand."""
    counts = HOSTILE.run(name, 20)
    assert counts.total() >= 20
    assert counts[HOSTILE.REFUSED]


@pytest.fixture
def changed_model(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the start model with another config or other weights."""

    def change(config: dict[str, Any] | None = None, weights: Callable[[Any], None] | None = None) -> Path:
        folder = tmp_path / "changed"
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        if weights is not None:
            with torch.no_grad():
                weights(model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
        return folder

    return change


def copy(source: Path, target: Path, **files: list[dict[str, Any]]) -> str:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, rows in files.items():
        (target / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(target)


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines()]


# -- data ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one row", "forget larger than retain"])
def test_small_sets(cli: CLI, data_folder: Path, tmp_path: Path, case: str):
    """One forget row, one retain row, one row of every split; ten forget rows with two to retain."""
    if case == "one row":
        splits = ("forget10", "retain90", "forget10_perturbed", "retain_perturbed", "world_facts_perturbed")
        changed = {name: rows_of(data_folder, name)[:1] for name in splits}
    else:
        changed = {"retain90": rows_of(data_folder, "retain90")[:2]}
    cli("fit", "--data.path", copy(data_folder, tmp_path / "data", **changed), "--run_dir", str(tmp_path / "run"))
    final = results(tmp_path / "run")
    assert final["counts"]["forget/probability"] == (1 if case == "one row" else 10)
    assert 0 <= final["final"]["metrics"]["forget/probability"] <= 1


def test_rows_that_are_all_equal(cli_error: Error, data_folder: Path, tmp_path: Path):
    data = copy(data_folder, tmp_path / "data", forget10=rows_of(data_folder, "forget10")[:1] * 4)
    assert "forget rows 0 and 1, counted from 0, have the same question and answer" in cli_error(
        "fit", "--data.path", data, "--run_dir", str(tmp_path / "run")
    )


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("question", None, "row 2, counted from 0: expected text as question, got None"),
        ("answer", 5, "row 2, counted from 0: expected text as answer, got 5"),
        ("answer", "", "row 2, counted from 0: expected text as answer, got ''"),
        ("paraphrased_answer", ["a", "b"], "expected text as paraphrased_answer, got"),
        ("perturbed_answer", "wrong", "expected a list of texts as perturbed_answer, got 'wrong'"),
        ("perturbed_answer", [1, 2, 3, 4, 5], "expected a list of texts as perturbed_answer, got [1, 2, 3, 4, 5]"),
    ],
)
def test_rows_to_measure(data_folder: Path, model_folder: Path, column: str, value: Any, message: str):
    """A text in the place of a list would be taken for a list of letters."""
    from simnpo_pl.benchmarks.builder import EvaluationBuilder
    from simnpo_pl.data.tokenization import PromptTemplate
    from simnpo_pl.evaluation.options import EvalOptions

    rows = rows_of(data_folder, "forget10_perturbed")
    rows[2][column] = value
    build = EvaluationBuilder(PromptTemplate(load_tokenizer(str(model_folder))), EvalOptions())
    with pytest.raises(UserError) as error:
        build.questions("forget", rows, source="forget10")
    assert message in str(error.value)


@pytest.mark.slow
def test_answer_of_a_hundred_thousand_characters(cli: CLI, cli_error: Error, data_folder: Path, tmp_path: Path):
    rows = rows_of(data_folder, "forget10")
    rows[3]["answer"] = "word " * 20_000
    data = ["--data.path", copy(data_folder, tmp_path / "data", forget10=rows)]
    error = cli_error("fit", *data, "--run_dir", str(tmp_path / "one"))
    assert "1 of 10 forget rows are longer than max_length = " in error
    quick = ["--eval.start", "false", "--eval.final", "false", "--trainer.limit_val_batches", "0"]
    cli("fit", *data, *quick, "--data.truncate", "true", "--run_dir", str(tmp_path / "two"))
    assert results(tmp_path / "two")["finished"]


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"question": "a", "answer": ' + b"9" * 10_000 + b"}"])
def test_json_that_python_does_not_take(tmp_path: Path, content: bytes):
    from simnpo_pl.data.sources import load_table

    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(UserError, match=r"rows.json line 1: not valid JSON \(.*\); expected one object per line"):
        load_table(str(tmp_path / "rows.json"), "--data.x", ("question",))


def test_text_of_rows_names_no_file(cli: CLI, data_folder: Path, tmp_path: Path):
    """Paths in questions and answers, in every file: nothing is written but the run folder."""
    evil = f"{tmp_path}/outside/../../outside"
    changed = {
        file.stem: [
            {**row, "question": f"{evil}/{i}", "answer": f"../../{evil}-{file.stem}-{i}"}
            for i, row in enumerate(rows_of(data_folder, file.stem))
        ]
        for file in data_folder.glob("*.json")
    }
    data = copy(data_folder, tmp_path / "data", **changed)
    before = sorted(tmp_path.rglob("*"))
    options = ["--trainer.max_epochs", "1", "--eval.cache_dir", "null", "--data.max_length", "256"]
    cli("fit", "--data.path", data, *options, "--run_dir", str(tmp_path / "run"))
    fresh = [f for f in tmp_path.rglob("*") if f not in before]
    assert fresh
    assert all(f == tmp_path / "run" or tmp_path / "run" in f.parents for f in fresh)


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_weights_that_are_not_numbers(
    cli_error: Error, changed_model: Callable[..., Path], tmp_path: Path, value: float
):
    folder = changed_model(weights=lambda model: model.model.layers[0].mlp.up_proj.weight.view(-1)[:1].fill_(value))
    options = ["--eval.start", "false", "--run_dir", str(tmp_path / "run")]
    assert "loss is not finite at optimizer step 0" in cli_error("fit", "--model.name", str(folder), *options)


@pytest.mark.slow
def test_tokenizer_without_pad_and_padded_vocabulary(
    cli: CLI, changed_model: Callable[..., Path], model_folder: Path, tmp_path: Path
):
    """Without a pad token no number changes: padding is masked by length. Tokens beyond the tokenizer have no text."""
    folder = changed_model(config={"pad_token_id": None})
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(folder)).pad_token is None
    for name, source in (("changed", folder), ("plain", model_folder)):
        cli("test", "--model.name", str(source), "--run_dir", str(tmp_path / name))
    assert results(tmp_path / "changed")["final"] == results(tmp_path / "plain")["final"]
    padded = changed_model(weights=lambda m: m.resize_token_embeddings(m.config.vocab_size + 64))
    size = len(load_tokenizer(str(padded)))
    assert load_causal_lm(str(padded)).config.vocab_size >= size + 64
    assert load_tokenizer(str(padded)).decode([size, size + 63]) == ""
    cli("test", "--model.name", str(padded), "--run_dir", str(tmp_path / "padded"))
    assert results(tmp_path / "padded")["counts"] == results(tmp_path / "plain")["counts"]


def test_vocabulary_smaller_than_the_tokenizers(cli_error: Error, changed_model: Callable[..., Path], tmp_path: Path):
    """An embedding that is not there would be read from anywhere on some devices."""
    folder = changed_model(weights=lambda m: m.resize_token_embeddings(500))
    error = cli_error("test", "--model.name", str(folder), "--run_dir", str(tmp_path / "run"))
    assert "has a vocabulary of 500 tokens, the data has the token " in error


def test_weights_that_are_missing_or_left_over(changed_model: Callable[..., Path], recwarn: pytest.WarningsRecorder):
    """A missing weight would be drawn at random."""
    from safetensors.torch import load_file, save_file

    folder = changed_model()
    state = load_file(folder / "model.safetensors")
    save_file({**state, "extra.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 weights of .* are not part of its architecture and are not used"):
        load_causal_lm(str(folder))
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, such as model.layers.1.mlp.up_proj.weight"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_weights_of_another_type_are_read_as_asked(
    changed_model: Callable[..., Path], model_folder: Path, dtype: torch.dtype
):
    folder = changed_model(weights=lambda model: model.to(dtype))
    model = load_causal_lm(str(folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for ours, plain in zip(model.parameters(), load_causal_lm(str(model_folder)).parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-3)


def test_context_shorter_than_the_prompts(cli_error: Error, changed_model: Callable[..., Path], tmp_path: Path):
    options = ["--model.name", str(changed_model(config={"max_position_embeddings": 8}))]
    options += ["--run_dir", str(tmp_path / "run")]
    assert "longer than max_length = 8 tokens" in cli_error("test", *options)
    assert "the prompt alone has" in cli_error("test", *options, "--data.truncate", "true")


def test_code_of_a_model_runs_only_when_trusted(
    cli_error: Error, changed_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Refused without a question to the terminal; with the option it runs, and a warning says so."""
    folder = changed_model(
        config={
            "model_type": "strange",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
        }
    )
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'strange'\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    options = ["--model.name", str(folder), "--run_dir", str(tmp_path / "run")]
    error = cli_error("test", *options)
    assert "comes with its own code, which is not run" in error
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(models, "_trusted", False)
    with pytest.warns(UserWarning, match="code that comes with models and tokenizers runs with all your rights"):
        models.trust_remote_code(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_causal_lm(str(folder)).config.model_type == "strange"
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("seed", ["-1", "4294967296", "true"])
def test_seeds_that_are_none(cli_error: Error, seed: str, tmp_path: Path):
    error = cli_error("test", "--seed_everything", seed, "--run_dir", str(tmp_path / "run"))
    assert "--seed_everything must be a whole number from 0 to 4294967295" in error
