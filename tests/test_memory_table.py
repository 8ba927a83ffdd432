"""The table of memory: published sizes, what methods differ in, and one case against what a process takes."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from simnpo_pl.lora import LoraOptions, add_adapter
from simnpo_pl.models import load_causal_lm


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import memory

    return memory


def test_large_models_have_their_published_sizes(memory: ModuleType):
    assert memory.counts(memory.LARGE["Llama-3.2-1B"])[0] == 1_235_814_400
    assert memory.counts(memory.LARGE["Llama-3.1-8B"])[0] == 8_030_261_248


def test_adapter_is_counted_as_it_is_made(memory: ModuleType, model_folder: Path):
    model = load_causal_lm(str(model_folder))
    config = {k: v for k, v in model.config.to_dict().items() if k in memory.SMALL["wide"]}
    add_adapter(model, LoraOptions(rank=memory.RANK))
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert memory.counts(config) == (frozen, made)


def test_what_methods_differ_in(memory: ModuleType):
    config = memory.SMALL["wide"]
    weights, adapter = memory.counts(config)
    cases = {(m, lora): memory.computed(memory.Case(config, m, lora), 2**20) for m in memory.METHODS for lora in (0, 1)}
    for (method, lora), parts in cases.items():
        assert parts["reference"] == (4 * weights if (method, lora) == ("NPO+KL", 0) else 0)
        assert parts["weights"] == 4 * (weights + lora * adapter)
        assert parts["Adam"] == 2 * parts["gradients"] == 8 * (adapter if lora else weights)
    assert cases["SimNPO", 0] == cases["NPO", 0]


def test_layers_keep_what_their_matrices_read(memory: ModuleType):
    """At least the input of every matrix and what attention reads; less in bfloat16 or if computed again."""
    config = memory.SMALL["wide"]
    case = memory.Case(config, "SimNPO", False)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    least = 4 * memory.ROWS * memory.WIDTH * (3 * hidden + inner + 3 * hidden) * config["num_hidden_layers"]
    kept = memory.layer_bytes(case)
    assert least < kept < 4 * least
    assert memory.layer_bytes(replace(case, autocast=True)) < kept
    assert memory.layer_bytes(replace(case, checkpointing=True)) < kept / 3


@pytest.mark.slow
def test_sum_is_what_a_process_takes(memory: ModuleType, tmp_path: Path):

    case = memory.Case(memory.SMALL["wide"], "SimNPO", False)
    torch.manual_seed(0)
    memory.llama(case.config).save_pretrained(tmp_path)
    expected = sum(memory.computed(case, 2**20).values())
    assert memory.in_a_process(str(tmp_path), case) == pytest.approx(expected, rel=0.2)
