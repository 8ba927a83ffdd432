"""Models loaded under FSDP2: the first process reads the weights, and every process ends with its share of the same."""

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM

from simnpo_pl.models.loading import load_causal_lm, save_model
from simnpo_pl.models.lora import LoraOptions, add_adapter
from simnpo_pl.models.sharding import shard
from simnpo_pl.utils.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "rope, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, vocab_size=64),
    "learned positions": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64),
    "experts in other files than layers": transformers.MixtralConfig(
        **SIZES, num_key_value_heads=2, num_local_experts=4, vocab_size=64
    ),
    "two ropes, scaled embedding": transformers.Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, vocab_size=64, sliding_window=8
    ),
}


def on_processes(count: int, function: Callable[[int, Any], None]) -> None:
    """Run a function of rank and mesh on several gloo processes, forked from this one."""
    # They meet in a file: a free port may be another's by the time it is used.
    file, children = tempfile.mktemp(), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                # Renews torch's thread pool, which a fork leaves invalid; transformers loads with several threads.
                torch.set_num_threads(1)
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
                distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count)
                function(rank, init_device_mesh("cpu", (count,)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * count


def same(sharded: Any, expected: Any) -> None:
    """All weights, buffers, settings and logits, bit for bit."""

    def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
        return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}

    for ours, theirs in (
        (whole(sharded.state_dict()), expected.state_dict()),
        (dict(sharded.named_buffers()), dict(expected.named_buffers())),
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and not ours[name].is_meta for name in theirs)
    assert sharded.generation_config.to_dict() == expected.generation_config.to_dict()
    assert sharded.config.to_dict() == expected.config.to_dict()
    assert sharded.name_or_path == expected.name_or_path
    assert not sharded.training
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(sharded(ids).logits, expected(ids).logits)
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (sharded, expected)]
    assert tied[0] is tied[1]


@pytest.mark.parametrize("kind", CONFIGS)
def test_processes_hold_the_model_of_the_files(tmp_path: Path, kind: str):
    """Three processes: they divide no weight evenly."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")

    def check(rank: int, mesh: Any) -> None:
        model = load_causal_lm(name, sharded=True)
        assert {weight.device.type for weight in model.parameters()} == {"meta" if rank else "cpu"}
        shard(model, mesh)
        same(model, load_causal_lm(name))

    on_processes(3, check)


def test_adapters(model_folder: Path, tmp_path: Path):
    """A new one is the one of a model on one process; a trained one is merged or kept next to its base."""
    trained, name = load_causal_lm(str(model_folder)), str(model_folder)
    add_adapter(trained, LoraOptions(rank=2))
    save_model(trained, None, tmp_path / "adapter", merge=False)
    expected = load_causal_lm(name)
    known = add_adapter(expected, LoraOptions(rank=2))

    def check(rank: int, mesh: Any) -> None:
        model = load_causal_lm(name, sharded=True)
        assert add_adapter(model, LoraOptions(rank=2)) == known
        shard(model, mesh)
        same(model, expected)
        for dtype in ("float32", "bfloat16"):
            model = load_causal_lm(str(tmp_path / "adapter"), dtype, sharded=True)
            shard(model, mesh)
            same(model, load_causal_lm(str(tmp_path / "adapter"), dtype))

    on_processes(2, check)


@pytest.mark.parametrize("change", ["shape", "missing"])
def test_files_that_do_not_fit_are_refused_by_every_process(model_folder: Path, tmp_path: Path, change: str):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    if change == "shape":
        weights["model.norm.weight"] = torch.zeros(5)
    else:
        del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def check(rank: int, mesh: Any) -> None:
        with pytest.raises(UserError, match="cannot be loaded" if change == "shape" else "lacks 1 of its weights"):
            load_causal_lm(str(folder), sharded=True)

    on_processes(2, check)
