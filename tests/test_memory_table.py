"""The estimate of memory: published sizes, what methods differ in, what fits into which card, what a process takes."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from transformers import Gemma3TextConfig, GPTNeoXConfig

from simnpo_pl.cli import summary
from simnpo_pl.models.loading import load_causal_lm, model_shapes
from simnpo_pl.models.lora import LoraOptions, add_adapter
from simnpo_pl.models.memory import LAYERS, Step, training_bytes
from simnpo_pl.models.sharding import ShardedStrategy
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import NPO, RKLD
from simnpo_pl.objectives.retain import KL
from test_configs import ROOT, resolved


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import memory

    return memory


def shapes(folder: Path, **changed: Any) -> tuple[Any, Step]:
    """A module under a trainer on one CPU, or on `world` devices of a strategy."""
    strategy, world = changed.pop("strategy", None), changed.pop("world", 1)
    module = UnlearningModule(str(folder), **changed)
    if strategy is None:
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
    else:
        strategy.parallel_devices, strategy.cluster_environment = [torch.device("cpu")], LightningEnvironment()
    model, settings = module.shapes()
    trainer = SimpleNamespace(strategy=strategy, precision="32-true", world_size=world)
    return model, Step(4, 16, **settings, **summary.on_devices(trainer))


def test_large_models_have_their_published_sizes(memory: ModuleType):
    """SmolLM2's by its card, rounded; Llama's exactly."""
    published = (134_515_008, 361_821_120, 1_235_814_400, 3_212_749_824, 8_030_261_248)
    for config, size in zip(memory.LARGE.values(), published, strict=True):
        with torch.device("meta"):
            assert sum(p.numel() for p in memory.llama(config).parameters()) == size


def test_adapter_is_counted_as_it_is_made(model_folder: Path):
    model = load_causal_lm(str(model_folder))
    add_adapter(model, LoraOptions(rank=4))
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    found = training_bytes(*shapes(model_folder, lora=LoraOptions(rank=4)))
    assert (found["weights"], found["gradients"], found["AdamW"]) == (4 * (frozen + made), 4 * made, 8 * made)
    halves = training_bytes(*shapes(model_folder, lora=LoraOptions(rank=4), dtype="bfloat16"))
    assert halves["weights"] == 2 * frozen + 4 * made


def test_what_methods_differ_in(model_folder: Path):
    weights = 4 * sum(p.numel() for p in model_shapes(str(model_folder)).parameters())
    plain = training_bytes(*shapes(model_folder))
    assert (plain["weights"], plain["gradients"], plain["AdamW"]) == (weights, weights, 2 * weights)
    assert training_bytes(*shapes(model_folder, objective=NPO())) == plain
    kl = training_bytes(*shapes(model_folder, retain_loss=KL()))
    assert kl["frozen models"] == weights
    assert kl["logits"] > plain["logits"]
    assert "frozen models" not in training_bytes(*shapes(model_folder, retain_loss=KL(), lora=LoraOptions()))
    rkld = training_bytes(*shapes(model_folder, objective=RKLD(), memorizing=str(model_folder)))
    assert rkld["frozen models"] == 2 * weights
    some = training_bytes(*shapes(model_folder, trainable=[r"model\.layers\.1\..*"]))
    assert some["weights"] == weights
    assert some["AdamW"] == 2 * some["gradients"] < weights
    assert 0.2 * plain["AdamW"] < training_bytes(*shapes(model_folder, optimizer="adamw_8bit"))["AdamW"]
    assert training_bytes(*shapes(model_folder, optimizer="adamw_8bit"))["AdamW"] < 0.6 * plain["AdamW"]


def test_several_devices(model_folder: Path):
    """FSDP2 divides, and gathers what is at work; DDP holds gradients twice."""
    one = training_bytes(*shapes(model_folder))
    four = training_bytes(*shapes(model_folder, strategy=ShardedStrategy(), world=4))
    for part in ("weights", "gradients", "AdamW"):
        assert four[part] == one[part] / 4
    assert 0 < four["gathered"] < 3 * one["weights"]
    copies = training_bytes(*shapes(model_folder, strategy=DDPStrategy(), world=4))
    assert copies == one | {"gradients": 2 * one["gradients"]}


def test_activations_are_what_matrices_read(memory: ModuleType):
    """At least the input of every matrix and what attention reads; less in bfloat16 or if computed again."""

    def kept(layers: int = 4, **changed: Any) -> float:
        config = memory.SMALL["wide"] | {"num_hidden_layers": layers}
        case = replace(memory.Case(config, "SimNPO", False), **changed)
        return memory.computed(case, gpu=False)["activations"]

    hidden, inner = memory.SMALL["wide"]["hidden_size"], memory.SMALL["wide"]["intermediate_size"]
    least = 4 * 2 * memory.ROWS * memory.WIDTH * (3 * hidden + inner + 3 * hidden) * 4
    assert least < kept() < 4 * least
    assert kept(autocast=True) < kept()
    assert kept(checkpointing=True) < kept() / 3
    # The first layers stand for all of them.
    assert kept(2 * LAYERS) - kept(LAYERS) == pytest.approx((kept(LAYERS) - kept()) * LAYERS / (LAYERS - 4), rel=0.01)
    # Copies in 16 bits of all trained weights are there until the forward pass ends.
    deep = memory.SMALL["wide"] | {"num_hidden_layers": 24, "vocab_size": 512}
    with torch.device("meta"):
        weights = sum(p.numel() for p in memory.llama(deep).model.layers.parameters() if p.ndim == 2)
    assert kept(24, autocast=True, checkpointing=True) > 2 * weights


@pytest.mark.parametrize("config", [Gemma3TextConfig, GPTNeoXConfig])
def test_other_architectures(config: Any, tmp_path: Path):
    own = {"num_key_value_heads": 1, "head_dim": 16} if config is Gemma3TextConfig else {}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    config(num_attention_heads=2, **sizes, **own).save_pretrained(tmp_path)
    assert training_bytes(*shapes(tmp_path))["activations"] > 8 * 64 * 32 * 4


def test_overlays_fit_into_their_cards(memory: ModuleType, capsys: pytest.CaptureFixture[str]):
    """The table names files that set what was computed, and leaves memory free on every card."""
    for name, changed in memory.OVERLAYS.items():
        overlay = ["--config", f"configs/hardware/{name}.yaml"] if name else []
        got = resolved(["fit", "--config", "configs/tofu.yaml", *overlay], capsys)
        case = memory.card_case(memory.LARGE["Llama-3.2-1B"], name)
        model = got["model"]
        assert (model["gradient_checkpointing"], model["dtype"]) == (
            case.checkpointing,
            "bfloat16" if case.half_base else "float32",
        )
        assert model["optimizer"] == ("adamw_8bit" if case.eight_bit else "adamw")
        assert (model["lora"] or {}).get("rank") == (memory.RANK if case.lora else None)
        assert got["data"]["init_args"]["per_device_batch"] == case.rows
        assert changed.keys() <= {"checkpointing", "half_base", "eight_bit", "rows"}
    page = (ROOT / "docs" / "scale.md").read_text()
    table = page.split("<!-- cards -->")[1].split("<!-- /cards -->")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith(("| Smol", "| Llama"))]
    assert [row[0].strip() for row in rows] == list(memory.LARGE)
    for card, cell in ((card, cell) for row in rows for card, cell in zip(memory.CARDS, row[1:], strict=True)):
        assert cell.strip() == "-" or float(cell.split(", ")[1]) <= 0.85 * card
    memory.LARGE = {"Llama-3.2-1B": memory.LARGE["Llama-3.2-1B"]}
    assert memory.cards_table().splitlines()[-1] in table


def plan_of(monkeypatch: pytest.MonkeyPatch, parts: dict[str, float], there: float | None) -> list[str]:
    monkeypatch.setattr(summary, "training_bytes", lambda *_: parts)
    monkeypatch.setattr(summary, "_memory_of", lambda *_: there)
    strategy = SimpleNamespace(root_device=torch.device("cuda:0"))
    trainer = SimpleNamespace(strategy=strategy, num_devices=1, world_size=1, precision="bf16-mixed")
    module = SimpleNamespace(shapes=lambda: (None, {}))
    return summary.memory(trainer, module, SimpleNamespace(micro_batch=lambda: (16, 128))).splitlines()


def test_plan_says_what_training_takes(monkeypatch: pytest.MonkeyPatch):
    parts = {"weights": 4.94e9, "gradients": 4.94e9, "AdamW": 9.89e9, "logits": 0.27e9, "activations": 6.92e9}
    fits = plan_of(monkeypatch, parts, 80e9)
    assert fits == [
        "memory: training takes about 27.0 GB; cuda:0 has 80.0 GB free",
        "  weights 4.9, gradients 4.9, AdamW 9.9, logits 0.3, activations 6.9",
    ]
    small = plan_of(monkeypatch, parts, 24e9)
    assert small[2:] == ["warning: training may run out of memory; docs/scale.md says what takes less"]
    assert all(len(line) <= 80 for line in small)
    del parts["activations"]
    assert plan_of(monkeypatch, parts, None)[0] == "memory: training takes about 20.0 GB, activations not counted"


@pytest.mark.slow
def test_sum_is_what_a_process_takes(memory: ModuleType, tmp_path: Path):

    case = memory.Case(memory.SMALL["wide"], "SimNPO", False)
    torch.manual_seed(0)
    memory.llama(case.config).save_pretrained(tmp_path)
    expected = sum(memory.computed(case, gpu=False).values())
    assert memory.in_a_process(str(tmp_path), case) == pytest.approx(expected, rel=0.2)
