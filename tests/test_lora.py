"""Low-rank adapters: the base as reference, what is trained, saved and exported."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from helpers import killed_in_epoch, results
from simnpo_pl.data.training import collate
from simnpo_pl.models.loading import load_causal_lm, load_tokenizer, save_model
from simnpo_pl.models.lora import LoraOptions
from simnpo_pl.module.optimization import adamw
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import DPO, NPO, UNDIAL, Objective, SimNPO
from simnpo_pl.objectives.retain import KL, NLL, RetainLoss
from simnpo_pl.utils.errors import UserError

CLI = Callable[..., None]


def perturbed(name: str, **kw: Any) -> UnlearningModule:
    """A module whose adapter is not at its start, where it would change nothing."""
    module = UnlearningModule(name, lora=LoraOptions(rank=4, alpha=8.0, **kw.pop("options", {})), **kw)
    module.configure_model()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in module.policy.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    return module


def batch_of(folder: str) -> dict[str, dict[str, torch.Tensor]]:
    from simnpo_pl.data.tokenization import PromptTemplate

    template = PromptTemplate(load_tokenizer(folder))

    def part(name: str, texts: list[str]) -> dict[str, torch.Tensor]:
        return collate(template.encode_rows([(f"{t}?", f"{t} {t} it is.") for t in texts], name))

    return {
        "forget": part("forget", ["Rome", "the longer name"]),
        "alternate": part("alternate", ["no", "I do not know"]),
        "retain": part("retain", ["Paris", "a city in the north"]),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("objective", "retain_loss"),
    [(NPO(), NLL()), (DPO(), NLL()), (SimNPO(), KL()), (SimNPO(), KL("all")), (UNDIAL(), NLL())],
)
def test_base_is_the_reference(
    model_folder: Path, objective: Objective, retain_loss: RetainLoss, attention: str, tmp_path: Path
):
    """Losses equal those against a separate copy of the start model; packed rows and padded ones."""
    settings = {"objective": objective, "retain_loss": retain_loss, "attn_implementation": attention}
    ours = perturbed(str(model_folder), **settings)
    # The same weights under another name are a separate copy.
    save_model(load_causal_lm(str(model_folder)), load_tokenizer(str(model_folder)), tmp_path / "copy")
    other = perturbed(str(model_folder), reference=str(tmp_path / "copy"), **settings)
    assert (ours._scorer().forward.way == "packed") is (attention == "sdpa")
    batch = batch_of(str(model_folder))
    one, two = ours.losses(batch), other.losses(batch)
    assert ours._reference._resident is None
    assert other._reference._resident is not None
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-7)
    assert abs(one["loss"].item()) > 1e-3
    one["loss"].backward()
    two["loss"].backward()
    for (name, mine), theirs in zip(ours.policy.named_parameters(), other.policy.parameters(), strict=True):
        assert (mine.grad is not None) is (".lora_" in name)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_an_adapted_head_does_not_score_the_reference(model_folder: Path):
    """Log-probs are made after the adapter is on again."""
    module = perturbed(str(model_folder), options={"target_modules": ["lm_head", "q_proj"]})
    part = batch_of(str(model_folder))["forget"]
    base = UnlearningModule(str(model_folder))
    base.configure_model()
    expected = base._scorer()({"x": part})["x"].logps().total
    torch.testing.assert_close(module._reference_scorer()({"x": part})["x"].logps().total, expected)
    assert not torch.allclose(module._scorer()({"x": part})["x"].logps().total, expected)


def test_reference_knows_no_dropout_and_gives_it_back(model_folder: Path):
    module = perturbed(str(model_folder), options={"dropout": 0.5})
    module.policy.train()
    part = {"x": batch_of(str(model_folder))["forget"]}
    with torch.no_grad():
        one, two = (module._reference_scorer()(part)["x"].logps().total for _ in range(2))
        assert torch.equal(one, two)
        assert module.policy.training
        one, two = (module._scorer()(part)["x"].logps().total for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_checkpointing_trains_the_adapter(model_folder: Path, mixed: bool):
    """The same gradients as without it, in float32 and bf16-mixed, also where the adapter is off for the reference."""
    gradients = []
    for checkpointing in (False, True):
        settings = {"objective": NPO(), "retain_loss": KL(), "gradient_checkpointing": checkpointing}
        module = perturbed(str(model_folder), **settings)
        module.policy.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = module.losses(batch_of(str(model_folder)))["loss"]
        loss.backward()
        gradients.append({n: p.grad for n, p in module.policy.named_parameters() if p.requires_grad})
    plain, saving = gradients
    assert all(value is not None and value.norm() > 0 for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(saving[name], value, rtol=1e-5, atol=1e-6)


def test_trained_parameters_by_hand(model_folder: Path):
    """Rank 4 on a Llama of 32 dimensions, 4 heads over 2 key-value heads of 8 (so 16 wide), feed-forward 64, 2 layers.

    r (in + out) of each: q 64, k 48, v 48, o 64, gate 96, up 96, down 96; that is 512, times rank 4, times 2 layers.
    """
    module = perturbed(str(model_folder))
    assert sum(p.numel() for p in module.policy.parameters() if p.requires_grad) == 512 * 4 * 2
    only = perturbed(str(model_folder), options={"target_modules": ["q_proj"]})
    assert sum(p.numel() for p in only.policy.parameters() if p.requires_grad) == 64 * 4 * 2


def test_fresh_adapter_changes_nothing_and_follows_the_seed(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    part = {"x": batch_of(str(model_folder))["forget"]}
    weights = []
    for seed in ("1", "1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.rand(3)
        module = UnlearningModule(str(model_folder), lora=LoraOptions())
        module.configure_model()
        with torch.no_grad():
            policy, base = (s(part)["x"].logps().total for s in (module._scorer(), module._reference_scorer()))
        assert torch.equal(policy, base)
        weights.append(torch.cat([p.flatten() for p in module.policy.parameters() if p.requires_grad]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_half_precision_base_has_a_full_precision_adapter(model_folder: Path):
    module = UnlearningModule(str(model_folder), lora=LoraOptions(), dtype="bfloat16")
    module.configure_model()
    assert {p.dtype for p in module.policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert module.losses(batch_of(str(model_folder)))["loss"].isfinite()


def test_exports_give_the_adapter_models_logits(model_folder: Path, tmp_path: Path):
    """Merged, and as an adapter that is loaded onto its base: by peft, by us, with the same logits."""
    module = perturbed(str(model_folder))
    tokenizer = load_tokenizer(str(model_folder))
    save_model(module.policy, tokenizer, tmp_path / "merged")
    save_model(module.policy, tokenizer, tmp_path / "adapter", merge=False)
    assert not list(tmp_path.rglob("merged/adapter*"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    ids = torch.arange(20).reshape(2, 10)
    module.policy.eval()
    with torch.no_grad():
        expected = module.policy(ids).logits
        for folder, load in (
            ("merged", AutoModelForCausalLM.from_pretrained),
            ("adapter", AutoPeftModelForCausalLM.from_pretrained),
            ("adapter", load_causal_lm),
        ):
            logits = load(str(tmp_path / folder)).eval()(ids).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(load_causal_lm(str(model_folder))(ids).logits, expected, atol=1e-2)


def test_pickled_adapter_is_not_loaded(model_folder: Path, tmp_path: Path):
    module = perturbed(str(model_folder))
    save_model(module.policy, load_tokenizer(str(model_folder)), tmp_path / "adapter", merge=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"contains no adapter_model\.safetensors"):
        load_causal_lm(str(tmp_path / "adapter"))


def test_run_resumes_exports_and_is_evaluated(cli: CLI, model_folder: Path, tmp_path: Path):
    """Checkpoints hold adapter weights alone; a resumed run ends as an uninterrupted one, whatever it exports."""
    lora = ["--model.objective", "NPO", "--model.lora.rank", "4", "--model.lora.dropout", "0.1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cli("fit", *lora, "--run_dir", str(whole))
    saved = torch.load(whole / "last.ckpt", weights_only=True)
    assert saved["state_dict"]
    assert all(".lora_" in name for name in saved["state_dict"])
    with killed_in_epoch(2):
        cli("fit", *lora, "--run_dir", str(cut))
    cli("fit", *lora, "--export.adapter", "true", "--run_dir", str(cut), "--ckpt_path", "last")
    assert not (cut / "model" / "model.safetensors").exists()
    assert results(cut)["final"] == results(whole)["final"]
    cli("test", "--model.name", str(cut / "model"), "--run_dir", str(tmp_path / "check"))
    final, check = (results(folder)["final"]["metrics"] for folder in (cut, tmp_path / "check"))
    assert check == pytest.approx(final, rel=1e-3)
    start = load_causal_lm(str(model_folder)).state_dict()
    trained = load_causal_lm(str(whole / "model")).state_dict()
    moved = {name.split(".")[-2] for name, weight in trained.items() if not torch.equal(weight, start[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_start_and_final_model_are_measured_on_the_same_rows(cli: CLI, tmp_path: Path):
    """With rate 0 they are one model."""
    options = ["--model.lora.rank", "4", "--model.lr", "0", "--trainer.max_epochs", "1", "--eval.generate_rows", "0"]
    options += ["--trainer.limit_val_batches", "60", "--eval.tokens_per_batch", "64"]
    cli("fit", *options, "--run_dir", str(tmp_path))
    start, final = (results(tmp_path)[model]["metrics"] for model in ("start", "final"))
    known = {name: value for name, value in start.items() if value is not None}
    assert known
    assert {name: value for name, value in final.items() if value is not None} == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--model.lora.rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "--model.lora.alpha must be a number above 0"),
        ({"alpha": float("nan")}, "--model.lora.alpha must be a number above 0"),
        ({"dropout": 1.0}, "--model.lora.dropout must be at least 0 and below 1"),
        ({"target_modules": []}, "--model.lora.target_modules names no layer"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        LoraOptions(**options)


def test_layers_that_are_not_there(model_folder: Path):
    module = UnlearningModule(str(model_folder), lora=LoraOptions(target_modules=["no_such_layer"]))
    with pytest.raises(UserError, match=r"--model.lora: .*no_such_layer"):
        module.configure_model()


def test_options_that_contradict(cli_error: Callable[..., str], tmp_path: Path):
    with pytest.raises(UserError, match="both say what is trained"):
        UnlearningModule("x", lora=LoraOptions(), trainable=[".*"])
    error = cli_error("fit", "--run_dir", str(tmp_path / "run"), "--export.adapter", "true")
    assert "--export.adapter true needs an adapter: give --model.lora.rank" in error


def test_checkpoint_of_another_policy(model_folder: Path, other_folder: Path):
    modules = {name: perturbed(str(folder)) for name, folder in (("ours", model_folder), ("other", other_folder))}
    saved: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        saved[name] = {"state_dict": {}}
        module.on_save_checkpoint(saved[name])
    modules["ours"].on_load_checkpoint(saved["ours"])
    whole = UnlearningModule(str(model_folder))
    whole.configure_model()
    larger = UnlearningModule(str(model_folder), lora=LoraOptions(rank=8, alpha=8.0))
    larger.configure_model()
    for module, what in (
        (whole, "contains an adapter, --model.lora trains the whole model"),
        (larger, "differs in its rank: 4 there, 8 here"),
        (modules["other"], "differs in its base; give --model.name"),
    ):
        with pytest.raises(UserError, match=what):
            module.on_load_checkpoint(saved["ours"])


def test_without_peft(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    module = UnlearningModule(str(model_folder), lora=LoraOptions())
    with pytest.raises(UserError, match="LoRA needs peft: pip install"):
        module.configure_model()


def test_eight_bit_optimizer_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="adamw_8bit needs bitsandbytes: pip install"):
        adamw(torch.nn.Linear(2, 2), 1e-3, (0.9, 0.999), 0.0, eight_bit=True)


def test_eight_bit_optimizer_trains():
    """Moments in one byte a value; the loss falls."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(128, 128), torch.randn(16, 128)
    optimizer = adamw(layer, 1e-2, (0.9, 0.999), 0.0, eight_bit=True)
    losses = []
    for _ in range(10):
        loss = layer(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8
