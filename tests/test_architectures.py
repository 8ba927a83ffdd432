"""Scores of many architectures against the model's own logits of each row alone."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Gemma3TextConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from simnpo_pl.models import forward, packing
from simnpo_pl.models.layers import layers_of, train_only
from simnpo_pl.models.loading import load_causal_lm, save_model
from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.models.lora import BaseScorer, LoraOptions, add_adapter, inject_adapter
from simnpo_pl.objectives import RMU
from simnpo_pl.utils.errors import UserError

# Values of whichever of these options a config class has.
SMALL: dict[str, Any] = {
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim": (96, 32, 48, 2, 4, 8),
    "n_embd n_layer n_head n_inner d_model n_layers n_heads num_layers num_heads": (32, 2, 4, 48, 32, 2, 4, 2, 4),
    "ffn_dim decoder_layers decoder_attention_heads decoder_ffn_dim word_embed_proj_dim": (48, 2, 4, 48, 32),
    "max_position_embeddings n_positions n_ctx sliding_window attention_window_size": (128, 128, 128, 16, 16),
    "use_sliding_window attention_chunk_size window_size embedding_size lru_width": (True, 16, 16, 32, 32),
    "moe_intermediate_size shared_expert_intermediate_size dense_intermediate_size": (24, 24, 48),
    "num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok": (4, 4, 4, 4, 2),
    "n_shared_experts n_group topk_group moe_k first_k_dense_replace mlp_only_layers": (1, 1, 1, 2, 1, []),
    "kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim num_dense_layers": (16, 16, 8, 8, 8, 1),
    "index_n_heads index_head_dim index_topk index_topk_blocks index_block_size": (2, 16, 8, 2, 4),
    "mamba_d_state mamba_dt_rank mamba_n_heads mamba_d_head mamba_chunk_size state_size": (8, 4, 4, 16, 8, 8),
    "n_mamba_heads mamba_headdim ssm_state_size mamba_num_heads mamba_head_dim chunk_size": (2, 16, 8, 4, 16, 8),
    "mamba_n_groups n_groups mamba_d_ssm conv_dim block_dim block_ff_dim": (1, 1, 64, 32, 32, 48),
    "linear_num_value_heads linear_num_key_heads linear_key_head_dim linear_value_head_dim": (4, 2, 8, 8),
    "vocab_size_per_layer_input hidden_size_per_layer_input global_head_dim num_kv_shared_layers": (96, 8, 8, 0),
    "num_key_value_heads router_jitter_noise input_jitter_noise": (2, 0.0, 0.0),
    "num_memory_blocks pad_token_id bos_token_id eos_token_id initializer_range": (1, 0, 1, 2, 0.2),
    "dropout attention_dropout hidden_dropout_prob attention_probs_dropout_prob": (0.0, 0.0, 0.0, 0.0),
    "resid_pdrop embd_pdrop attn_pdrop activation_dropout": (0.0, 0.0, 0.0, 0.0),
}
VALUES = {name: value for names, values in SMALL.items() for name, value in zip(names.split(), values, strict=True)}
LATENT = {"num_key_value_heads": 4, "head_dim": None}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}

# How each is run, and what of its config is not in SMALL.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("packed", {}),
    "mistral": ("packed", {}),
    "mixtral": ("packed", {}),
    "qwen2": ("packed", {"max_window_layers": 1}),
    "qwen3": ("packed", {}),
    "qwen3_moe": ("packed", {}),
    "gemma": ("packed", {}),
    "gemma2": ("padded", {"final_logit_softcapping": 0.5}),
    "gemma3_text": ("packed", {"layer_types": ["sliding_attention", "full_attention"]}),
    "gemma4_text": ("packed", {}),
    "phi": ("packed", {}),
    "phi3": ("packed", {}),
    "phimoe": ("packed", {}),
    "gpt2": ("packed", {}),
    "gpt_neox": ("packed", {}),
    "opt": ("packed", {}),
    "olmo2": ("packed", {}),
    "cohere": ("packed", {"logit_scale": 0.1}),
    "cohere2": ("packed", {"layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("packed", {"logits_scaling": 8.0}),
    "deepseek_v3": ("packed", LATENT),
    "glm4": ("packed", {}),
    "smollm3": ("packed", {}),
    "llama4_text": ("packed", {"layer_types": ["chunked_attention", "full_attention"]}),
    "gpt_oss": ("padded", {}),
    "bloom": ("padded", {}),
    "falcon": ("padded", {}),
    "mamba": ("padded", {}),
    "mamba2": ("padded", {"num_heads": 4, "head_dim": 16}),
    "lfm2": ("padded", {"full_attn_idxs": [1]}),
    "recurrent_gemma": ("padded", {"block_types": ["recurrent", "attention"]}),
    "jamba": ("padded", {}),
    "zamba2": (
        "padded",
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "hybrid", "linear_attention"],
            "hybrid_layer_ids": [1],
            "num_key_value_heads": 4,
        },
    ),
    "falcon_h1": ("padded", {}),
    "qwen3_next": ("padded", {"layer_types": ["linear_attention", "full_attention"]}),
    "deepseek_v32": ("alone", LATENT),
    "glm_moe_dsa": ("alone", LATENT),
    "axk2": ("alone", LATENT),
    "minimax_m3_vl_text": ("alone", {"layer_types": ["full_attention", "minimax_m3_sparse"]}),
}


def build(kind: str, **options: Any) -> Any:
    """A tiny model of an architecture, in eval mode."""
    config_class = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    given = {name: value for name, value in (VALUES | options).items() if name in known or name in options}
    given = {name: value for name, value in given.items() if value is not None}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    config = config_class(**given)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    assert size < 2e7, f"{kind} has {size} parameters"
    torch.manual_seed(0)
    return model_class._from_config(config).eval()


def rows(sizes: tuple[int, ...] = (70, 33, 21, 5)) -> dict[str, torch.Tensor]:
    """Right-padded rows of which some begin alike; all tokens but the first are scored."""
    ids = torch.randint(3, 90, (len(sizes), max(sizes)), generator=torch.Generator().manual_seed(1))
    ids[1, :20], ids[-1, :3] = ids[0, :20], ids[-2, :3]
    mask = (torch.arange(max(sizes)) < torch.tensor(sizes).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def own_logps(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probs of the tokens of all rows, from the model's logits of each row alone."""
    logps = []
    for ids, length in zip(batch["input_ids"], batch["attention_mask"].sum(dim=1).tolist(), strict=True):
        logits = model(input_ids=ids[None, :length], use_cache=False).logits[0, :-1].float()
        logps.append(logits.log_softmax(dim=-1).gather(1, ids[1:length, None])[:, 0])
    return torch.cat(logps)


def logps_of(scorer: Scorer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return scorer({"rows": batch})["rows"].token_logps()


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_log_probs_are_those_of_each_row_alone(kind: str):
    """To 1e-4 nats a token, in the way that is meant, and padded where rows are packed; the model stays what it was."""
    way, options = FAMILIES[kind]
    model, batch = build(kind, **options), rows()
    expected, attention = own_logps(model, batch), model.config.get_text_config()._attn_implementation
    scorer = Scorer(model)
    found = logps_of(scorer, batch)
    assert scorer.forward.way == way
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if way == "packed":
        scorer.forward.way = "padded"
        torch.testing.assert_close(logps_of(scorer, batch), expected, rtol=0, atol=1e-4)
    assert model.config.get_text_config()._attn_implementation == attention
    assert torch.equal(own_logps(model, batch), expected)


@pytest.mark.parametrize(
    "kind", ["llama", "phimoe", "gemma3_text", "deepseek_v3", "lfm2", "recurrent_gemma", "deepseek_v32"]
)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
@torch.no_grad()
def test_bf16(kind: str, weights: torch.dtype):
    """The same ways in bf16; log-probs differ by rounding, a leak between rows is larger."""
    way, options = FAMILIES[kind]
    model, batch = build(kind, **options).to(weights), rows()
    scorer = Scorer(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
        difference = (logps_of(scorer, batch) - own_logps(model, batch)).abs()
    assert scorer.forward.way == way
    assert difference.max() < 0.1
    assert difference.mean() < 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "phimoe", "lfm2", "deepseek_v32"])
def test_gradient_is_that_of_rows_alone(kind: str, checkpointing: bool):
    """To 1e-4, relative, packed, padded and one by one, also where activations are made again."""
    way, options = FAMILIES[kind]
    model, batch, gradients = build(kind, **options).train(), rows(), []
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    scorer = Scorer(model)
    assert scorer.forward.way == way
    for logps in (logps_of(scorer, batch), own_logps(model, batch)):
        model.zero_grad()
        (logps * torch.linspace(0, 1, len(logps))).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item() < 1e-4


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_adapters_on_experts(kind: str, tmp_path: Path):
    """With the default layers, of which all experts' weights are in one tensor: trained, turned off and merged."""
    build(kind).save_pretrained(tmp_path / "base")
    model, batch = load_causal_lm(str(tmp_path / "base")), rows((30, 20, 5))
    with torch.no_grad():
        base = own_logps(model, batch)
    add_adapter(model, LoraOptions(rank=2))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    torch.manual_seed(3)
    for weight in trained:
        weight.data.normal_(std=0.3)
    found = logps_of(scorer := Scorer(model), batch)
    found.sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in trained)
    with torch.no_grad():
        torch.testing.assert_close(found, own_logps(model, batch), rtol=0, atol=1e-4)
        torch.testing.assert_close(logps_of(BaseScorer(scorer), batch), base, rtol=0, atol=1e-4)
        save_model(model, None, tmp_path / "merged")
        merged = load_causal_lm(str(tmp_path / "merged"))
        torch.testing.assert_close(own_logps(merged, batch), found, rtol=0, atol=1e-3)
    assert not torch.allclose(found, base, atol=0.1)


def test_modules_for_images_are_left_alone():
    """Of a model for text and images whose two parts have equally many layers, and names that match."""
    text = {**{name: VALUES[name] for name in Gemma3TextConfig().to_dict() if name in VALUES}, "num_hidden_layers": 3}
    image = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    image |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=image, **tokens)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert layers_of(model) is model.model.language_model.layers
    train_only(model, RMU(layer=2).default_trainable)
    layers = "model.language_model.layers"
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained == [f"{layers}.{number}.mlp.down_proj.weight" for number in range(3)]
    inject_adapter(model, LoraOptions(rank=2))
    logps_of(Scorer(model.train()), rows((20, 5))).sum().backward()
    adapted = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(adapted) == 3 * 7 * 2
    assert all(weight.grad is not None for weight in adapted)


def test_layer_states_one_by_one():
    """Hidden states of a layer are those of each row alone."""
    model, batch = build("deepseek_v32", **LATENT), rows()
    states = Scorer(model)({"rows": batch}, layers=[0])["rows"].layers[0]
    kept: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda module, given, output: kept.append(output[0]))
    own_logps(model, batch)
    expected = torch.cat([hidden.reshape(-1, 32)[1:] for hidden in kept])
    torch.testing.assert_close(states.hidden, expected, rtol=0, atol=1e-5)
    assert states.rows.bincount().tolist() == [69, 32, 20, 4]


def test_selection_of_keys_is_seen_in_the_modules():
    """Versions of transformers have other names for these layers in the config."""
    model = build("deepseek_v32", **LATENT)
    model.config.layer_types = None
    assert Scorer(model).forward.way == "alone"


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_bidirectional_models_are_refused(kind: str):
    """What sees the label is not scored, unless its config makes it a decoder."""
    with pytest.raises(UserError, match="is no causal language model: its output for a token depends on later tokens"):
        Scorer(build(kind))
    assert Scorer(build(kind, is_decoder=True)).forward.way == "padded"


@torch.no_grad()
def test_small_weights_hide_nothing():
    """A convolution whose weights are near zero, so that it changes no log-prob yet, is found."""
    options = FAMILIES["lfm2"][1]
    model, batch = build("lfm2", **options, initializer_range=1e-4), rows()
    scorer = Scorer(model)
    assert scorer.forward.way == "padded"
    for parameter, trained in zip(model.parameters(), build("lfm2", **options).parameters(), strict=True):
        parameter.copy_(5 * trained)
    torch.testing.assert_close(logps_of(scorer, batch), own_logps(model, batch), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@torch.no_grad()
def test_positions_that_depend_on_the_longest_row(rope: str, caplog: pytest.LogCaptureFixture):
    """A short row scores the same beside a long one, after it and alone; short rows by themselves are packed."""
    if rope == "dynamic":
        parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    else:
        parameters = {**LONGROPE, "original_max_position_embeddings": 32}
    model = build("llama", rope_parameters=parameters, max_position_embeddings=32 if rope == "dynamic" else 128)
    # From short to long, transformers' own frequencies are those of each row, too.
    sizes = (5, 23, 32, 40, 60)
    expected = own_logps(copy.deepcopy(model), rows(sizes))
    scorer = Scorer(model)
    assert "with a row of more than 32 tokens, on which its positions depend, rows are run one by one" in caplog.text
    for _ in range(2):
        torch.testing.assert_close(logps_of(scorer, rows(sizes)), expected, rtol=0, atol=1e-4)
    short = {key: value[:3, :32] for key, value in rows(sizes).items()}
    torch.testing.assert_close(logps_of(scorer, short), expected[: 4 + 22 + 31], rtol=0, atol=1e-4)
    assert scorer.forward.way == "packed"
    with pytest.raises(UserError, match="has no logits of padding"):
        scorer.all_logits(rows(sizes))


@pytest.mark.parametrize("kind", ["llama", "deepseek_v32"])
def test_generation_and_config_are_the_users(kind: str, tmp_path: Any):
    """Between and after scoring, `generate` and the saved config are what they were."""
    model, batch = build(kind, **FAMILIES[kind][1]), rows()
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def generated() -> torch.Tensor:
        return torch.stack(model.generate(batch["input_ids"][:1, :20], **options).logits)

    before = generated()
    model.save_pretrained(tmp_path / "before")
    logps_of(Scorer(model), batch)
    assert torch.equal(generated(), before)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "after" / name).read_text() == (tmp_path / "before" / name).read_text()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_faults_of_the_device_are_raised(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    """A packed pass that runs out of memory is no model that cannot be packed."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise error("device")

    monkeypatch.setattr(packing.F, "scaled_dot_product_attention", broken)
    model = build("llama")
    with pytest.raises(error):
        packing.why_not_packed(model, model.model)


@torch.no_grad()
def test_packed_rows_are_checked_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """When weights had time to move and when rows are far longer, against rows alone; then rows are padded."""
    passes = forward.packed_hidden

    def shifted(*args: Any) -> torch.Tensor:
        return passes(*args).roll(1, dims=0)

    monkeypatch.setattr(forward, "_CHECKED_CALLS", (1, 3))
    for calls, sizes in ((3, (21, 5)), (2, (70, 33, 21, 5))):
        model, short, batch = build("llama"), rows((21, 5)), rows(sizes)
        scorer = Scorer(model)
        for call in range(1, calls):
            monkeypatch.setattr(forward, "packed_hidden", passes if call == 1 else shifted)
            logps_of(scorer, short)
        assert scorer.forward.way == "packed"
        monkeypatch.setattr(forward, "packed_hidden", shifted)
        torch.testing.assert_close(logps_of(scorer, batch), own_logps(model, batch), rtol=0, atol=1e-4)
        assert scorer.forward.way == "padded"
        assert "LlamaForCausalLM: rows are padded, not packed (packed they differ from rows alone by" in caplog.text
        caplog.clear()


def test_a_model_that_never_repeats_its_scores_runs_row_by_row(monkeypatch: pytest.MonkeyPatch):
    """The comparison ends with the last way, also where even that does not repeat."""
    monkeypatch.setattr(forward.Forward, "_logps", lambda self, way, few: (torch.randn(9), torch.float32))
    scorer = Scorer(build("llama"))
    logps_of(scorer, rows((21, 5)))
    assert scorer.forward.way == "alone"


# Of the others, what of their configs is not in SMALL.
OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu"), LATENT),
    "codegen": {"rotary_dim": 8},
    "dots3_note_text": LATENT,
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
}
MASKED = """
    bert bert-generation big_bird camembert cpmant data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet
"""
# No tiny config without pictures, sound or the text part's own name; or one that needs more than a handful of options.
UNBUILT = """
    blt cohere_compass_text dbrx dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified
    gemma4_unified_assistant git got_ocr2 llama4 longcat_flash mllama moss_transcribe_diarize musicgen
    musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp reformer xmod
"""
# Its masks are finite numbers: padding changes a row a little.
PROPHETNET = {"prophetnet": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - FAMILIES.keys() - set((UNBUILT + MASKED).split()))
)
@torch.no_grad()
def test_log_probs_of_all_others(kind: str):
    """To 1e-4 nats a token, in whatever way."""
    model, batch = build(kind, **OTHERS.get(kind, {})), rows()
    expected = own_logps(model, batch)
    torch.testing.assert_close(logps_of(Scorer(model), batch), expected, rtol=0, atol=PROPHETNET.get(kind, 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MASKED.split())
def test_all_masked_models_are_refused(kind: str):
    with pytest.raises(UserError, match="is no causal language model"):
        Scorer(build(kind))
