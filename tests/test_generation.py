"""Generation against transformers' own, prompt by prompt, for many architectures; what is cut, ignored or refused."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from helpers import run_processes
from simnpo_pl.models import decoding
from simnpo_pl.models.generation import Sampler, _batched, _trial, draws_of, generate, most_probable
from simnpo_pl.utils.errors import UserError

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [5, 20, 21, 22], [30, 31], [7, 8, 9]]
PLAIN = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
    "pad_token_id": 0,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bloom": {},
    "deepseek_v3": {
        **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
        **{"moe_intermediate_size": 16, "first_k_dense_replace": 1},
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "falcon_mamba": {"state_size": 8},
    "gemma3_text": {**LOCAL, "query_pre_attn_scalar": 8},
    "gpt2": {},
    "gpt_oss": {**EXPERTS, "sliding_window": 4},
    "granitemoehybrid": {**MAMBA, **EXPERTS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": {**MAMBA, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "n_groups": 2, "chunk_size": 8},
    "minimax": {**HYBRID, **EXPERTS, "block_size": 4},
    "mistral": {"sliding_window": 4},
    "nemotron_h": {
        **{"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
        **{"ssm_state_size": 8, "chunk_size": 8},
    },
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_5_text": {**HYBRID, **LINEAR},
    "qwen3_next": {**HYBRID, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 4},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"hidden_size": 128, "num_heads": 4, "chunk_size": 16},
    "zamba": {
        **{"layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"], "num_hidden_layers": 4, "mamba_d_state": 8},
        **{"attention_head_dim": 16, "attention_hidden_size": 64},
    },
    "zamba2": {
        **{"layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1], "num_hidden_layers": 3},
        **{"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1},
        **{"num_key_value_heads": 4, "head_dim": 16},
    },
}
MORE: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("biogpt", "ctrl", "diffllama", "doge", "gemma", "gpt_bigcode", "gpt_neox", "llama")},
    **{name: {} for name in ("mpt", "nanochat", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "smollm3")},
    **{name: {} for name in ("stablelm", "starcoder2")},
    **{name: {"rotary_dim": 4} for name in ("codegen", "gptj")},
    **dict.fromkeys(("cohere2", "exaone4"), LOCAL),
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 4},
    "mixtral": EXPERTS,
    "modernbert-decoder": {"local_attention": 4},
    "olmo_hybrid": {**HYBRID, **LINEAR},
    "xglm": {"ffn_dim": 48},
}
NOT_BATCHED = {
    **dict.fromkeys(("falcon_mamba", "mamba", "minimax", "openai-gpt", "recurrent_gemma", "xlstm"), "of one length"),
    "rwkv": "one prompt at a time",
}


def build(family: str, **settings: Any) -> Any:
    """A model with random weights of enough spread that no two tokens are near a tie."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"{family} is not in transformers {transformers.__version__}")
    torch.manual_seed(0)
    own = {**PLAIN, **{**FAMILIES, **MORE}.get(family, {}), **settings}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5 if len(weight) == PLAIN["vocab_size"] else 0.3)
    return model


def alone(model: Any, prompt: list[int], tokens: int, **settings: Any) -> list[int]:
    """What transformers' own greedy generation gives for one prompt."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def warned(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call gives, and the lines of this package that it warns with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(line.message) for line in caught if line.category is UserWarning]


@pytest.mark.parametrize("family", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_equals_generate_of_each_prompt_alone(family: str):
    """Token for token, where rows end at different times; what is not decoded in one batch is said."""
    model = build(family)
    free = [alone(model, prompt, 12) for prompt in PROMPTS]
    cuts = {end: [new[: new.index(end)] if end in new else new for new in free] for end in range(PLAIN["vocab_size"])}
    end, expected = max(cuts.items(), key=lambda item: len({len(new) for new in item[1]}))
    assert len({len(new) for new in expected}) > 1
    found, lines = warned(lambda: generate(model, PROMPTS, 12, [end]))
    assert found == expected
    assert [NOT_BATCHED[family] in line for line in lines] == [True] if family in NOT_BATCHED else not lines
    # The trial is made once.
    for tokens in (1, 2):
        assert warned(lambda n=tokens: generate(model, PROMPTS, n, [])) == ([new[:tokens] for new in free], [])


class Graph:
    """A CUDA graph on the CPU: what a capture computes is undone, a replay computes it again in the same memory.

    A step that reads what changes outside of this memory passes here, and would not on CUDA.
    """

    def __init__(self, steps: Any) -> None:
        self.steps, self.memory = steps, self._memory(steps)
        self.before = [x.clone() for x in self.memory]

    @staticmethod
    def _memory(steps: Any) -> list[torch.Tensor]:
        layers = [layer for cache in steps.cache.values() for layer in cache.layers]
        return [steps.place, *steps.inputs.values(), *(x for layer in layers for x in (layer.keys, layer.values))]

    def capture_begin(self, pool: str, capture_error_mode: str) -> None:
        assert pool == ("new" if self.steps.graph is None else "its own")

    def pool(self) -> str:
        return "its own"

    def capture_end(self) -> None:
        for x, value in zip(self.memory, self.before, strict=True):
            x.copy_(value)

    def replay(self) -> None:
        assert all(map(lambda one, other: one is other, self.memory, self._memory(self.steps)))
        self.steps.logits.copy_(self.steps._step())


class NoGraph(Graph):
    def capture_end(self) -> None:
        super().capture_end()
        raise torch.AcceleratorError("operation not permitted when stream is capturing")


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, Graph, NoGraph])
@pytest.mark.parametrize("family", ["bloom", "deepseek_v3", "gpt2", "llama", "opt", "qwen3_next"])
def test_steps_on_the_same_memory(family: str, kind: Any, monkeypatch: pytest.MonkeyPatch):
    """Rows end at different times, and half of them at once; a step that no graph can hold still gives its tokens."""
    model, graphs, given = build(family, max_position_embeddings=16), [], []
    emptied, ended = [], []
    begin, capture = decoding.Repeated.__init__, decoding.Repeated._capture

    def on_cuda(steps: Any, *args: Any) -> None:
        begin(steps, *args)
        steps.captures = True

    def captures(steps: Any) -> None:
        graphs.append(kind(steps))
        capture(steps)

    def choose(logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        given.append((logits, logits.clone()))
        return most_probable(logits, rows, step)

    if kind:
        monkeypatch.setattr(decoding.Repeated, "__init__", on_cuda)
        monkeypatch.setattr(decoding.Repeated, "_capture", captures)
        monkeypatch.setattr(decoding, "_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs[-1])
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "new")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**32 - 1 + len(graphs) % 2, 0))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(graphs)))
        for name in ("end", "release"):
            call = f"_cuda_{name}{'AllocateTo' * (name == 'end')}Pool"
            monkeypatch.setattr(torch._C, call, lambda *args, name=name: ended.append((name, *args)))
        random = SimpleNamespace(clone_state=str, graphsafe_set_state=lambda state: ended.append(("random", state)))
        monkeypatch.setattr(torch.cuda, "default_generators", {None: random})
    # In the second batch an ended row goes on past the last position.
    for limits in ([10, 3, 3, 12, 3], [3, 12, 12, 12, 3]):
        found = _batched(model, PROMPTS, limits, [], choose, repeat=True)
        assert found == [alone(model, prompt, tokens) for prompt, tokens in zip(PROMPTS, limits, strict=True)]
    assert all(torch.equal(*pair) for pair in given)
    # One for each number of rows; none after one that failed, or where a model keeps more than keys and values.
    assert len(graphs) == (0 if family == "qwen3_next" else {None: 0, Graph: 4, NoGraph: 1}[kind])
    # Where memory is scarce.
    assert emptied == [number for number in range(1, len(graphs) + 1) if number % 2 == 0]
    # A capture that failed is over for torch's random numbers and memory, too.
    failed = [("random", ""), ("end", None, "new"), ("release", None, "new")]
    assert ended == (failed if kind is NoGraph and graphs else [])


@torch.no_grad()
def test_trial_has_room_for_a_window():
    """GPT-Neo counts its window from the end of the cache, which steps on the same memory have not reached."""
    for family, fits in {"gpt_neo": False, "llama": True}.items():
        agrees = _trial(build(family, window_size=32))
        assert agrees(_batched)
        assert agrees(partial(_batched, repeat=True)) is fits


@pytest.mark.parametrize("family", ["lfm2", "mamba", "rwkv"])
def test_samples_do_not_depend_on_their_batch(family: str):
    model = build(family)
    draws = torch.stack([draws_of(0, row, 0, 8) for row in range(len(PROMPTS))])
    together = generate(model, PROMPTS, 8, [1], Sampler(draws, 2.0))
    single = [generate(model, [p], 8, [1], Sampler(draws[i : i + 1], 2.0))[0] for i, p in enumerate(PROMPTS)]
    assert together == single
    assert together != generate(model, PROMPTS, 8, [1])
    # By hand: the model's own logits, without cache.
    ids = list(PROMPTS[1])
    for step in range(8):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
        ids.append(int(Sampler(draws, 2.0)(logits, torch.tensor([1]), step)))
    assert together[1] == (ids[2:] if 1 not in ids[2:] else ids[2 : ids.index(1, 2)])


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt"])
def test_learned_positions_end_an_answer(family: str):
    model = build(family, max_position_embeddings=16)
    rooms = [16 - len(prompt) for prompt in PROMPTS]
    found, lines = warned(lambda: generate(model, PROMPTS, 200, []))
    assert found == [alone(model, prompt, room) for prompt, room in zip(PROMPTS, rooms, strict=True)]
    assert sum("takes 16 tokens, the longest prompt with 200 new ones has more" in line for line in lines) == 1
    assert warned(lambda: generate(model, PROMPTS, 200, []))[1] == []
    with pytest.raises(UserError, match="takes 16 tokens, a prompt has 16: shorten the prompts"):
        generate(model, [[3] * 16], 1, [])


def test_rotary_positions_past_the_context_are_said():
    model = build("llama", max_position_embeddings=16)
    found, lines = warned(lambda: generate(model, PROMPTS, 12, []))
    assert found == [alone(model, prompt, 12) for prompt in PROMPTS]
    assert [bool(re.search("takes 16 tokens.*may be poor", line)) for line in lines] == [True]


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_settings_that_change_tokens_are_named_and_not_followed(family: str):
    model = build(family)
    plain = [alone(model, prompt, 8) for prompt in PROMPTS]
    likely = plain[0][0]
    settings = {
        **{"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [likely], "min_length": 30},
        **{"bad_words_ids": [[likely]], "forced_eos_token_id": 3, "do_sample": True, "temperature": 0.5},
    }
    model.generation_config = own = GenerationConfig(**settings, top_p=1.0, num_beams=1, eos_token_id=2)
    assert model.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=8, do_sample=False)[0, 6:].tolist() != plain[0]
    found, lines = warned(lambda: generate(model, PROMPTS, 8, []))
    assert found == plain
    assert model.generation_config is own
    (line,) = (line for line in lines if "generation_config" in line)
    assert set(re.findall(r"(\w+)=", line)) == set(settings)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no"), MemoryError()]
)
def test_want_of_memory_is_no_answer_to_the_trial(error: Exception, monkeypatch: pytest.MonkeyPatch):
    """It is raised, so that the batch is halved, and the next call tries again."""
    model = build("llama")
    forward, calls = model.forward, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise error
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", fails)
        with pytest.raises(type(error)):
            generate(model, PROMPTS, 4, [])
    found, lines = warned(lambda: generate(model, PROMPTS, 4, []))
    assert found == [alone(model, prompt, 4) for prompt in PROMPTS]
    assert not lines


def test_model_that_reads_ahead_is_refused():
    """In CPM-Ant a token changes the logits before it."""
    with pytest.raises(UserError, match="does not give the logits of one pass over the whole text"):
        generate(build("cpmant"), PROMPTS, 4, [])


def test_one_token_list_a_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch):
    model = build("llama")
    generate(model, PROMPTS, 1, [])
    waits: list[str] = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if "aten.index." in str(op) else []
            waits.extend([str(op)] if masks or "_local_scalar" in str(op) or "nonzero" in str(op) else [])
            return op(*args, **(kwargs or {}))

    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (waits.append("tolist"), to_list(tensor))[1])
    with Waits():
        generate(model, PROMPTS, 20, [])
    # One of each step is transformers' own look at the mask.
    assert len(waits) <= 2 * 20 + 1


@torch.no_grad()
def test_weights_are_rounded_once_for_all_tokens():
    """Under an autocast that keeps no rounded weights, as Lightning's; the tokens are the same."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, PROMPTS, 4, [])
    rounded = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            rounded.extend([op] if "_to_copy" in str(op) and args[0] is model.lm_head.weight else [])
            return op(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), Casts():
        assert generate(model, PROMPTS, 4, []) == expected
    assert len(rounded) == 1


@pytest.mark.slow
def test_sharded_model_that_is_not_batched(model_folder: Path, run_options: list[str], tmp_path: Path):
    """Processes with fewer groups of prompts take part until the others are done."""
    from simnpo_pl.__main__ import main

    shutil.copytree(model_folder, tmp_path / "mamba")
    vocabulary = AutoConfig.from_pretrained(model_folder).vocab_size
    build("mamba", vocab_size=vocabulary).save_pretrained(tmp_path / "mamba")
    options = ["test", *run_options, "--model.name", str(tmp_path / "mamba"), "--eval.prompts_per_batch", "4"]
    with pytest.warns(UserWarning, match="MambaForCausalLM generates prompts of one length at a time"):
        main([*options, "--run_dir", str(tmp_path / "one"), "--debug"])
    shared = ["--config", "configs/hardware/fsdp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    assert run_processes(2, [*options, *shared, "--run_dir", str(tmp_path / "two")], tmp_path / "log") == 0
    texts = [
        [json.loads(line).get("generation") for line in (tmp_path / name / "rows.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5
