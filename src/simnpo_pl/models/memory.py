"""Memory of a training step, estimated from a model's shapes; see docs/scale.md."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from simnpo_pl.models import head
from simnpo_pl.models.layers import layers_of
from simnpo_pl.models.packing import Layout, packed_hidden
from simnpo_pl.utils.errors import UserError

LAYERS = 6
"""Layers that are run; no model's pattern of different layers is longer."""


@dataclass(frozen=True)
class Step:
    """How a model is trained.

    Args:
        rows: Rows of a forward pass on one device, forget and retain rows together.
        width: Tokens in each.
        autocast: Whether matrices are multiplied in 16 bits while weights stay in 32.
        checkpointing: Whether layers are computed again in the backward pass.
        eight_bit: Whether AdamW's moments have 8 bits.
        frozen: Frozen models that stay in memory.
        reads_logits: Whether a loss reads whole distributions, not only the labels' log-probs.
        gpu: Whether on a GPU, where more logits are kept, and computed at once; see `simnpo_pl.models.head`.
        shards: Devices over which everything but activations and logits is sharded.
        buckets: Whether DDP's buckets hold the gradients a second time.
        copies: Copies of the trained weights that an update rule keeps.
    """

    rows: int
    width: int
    autocast: bool = False
    checkpointing: bool = False
    eight_bit: bool = False
    frozen: int = 0
    reads_logits: bool = False
    gpu: bool = True
    shards: int = 1
    buckets: bool = False
    copies: int = 0


def training_bytes(model: Any, step: Step) -> dict[str, float]:
    """Bytes on one device by use; without `activations` where the model does not run on shapes only.

    The model is on the meta device, in the types of its weights; what is trained requires a gradient. It is modified.
    """
    layers, trained = nn.ModuleList(), [p for p in model.parameters() if p.requires_grad]
    with suppress(UserError):
        layers = layers_of(model)
    weights, gradients = (sum(p.nbytes for p in found) for found in (model.parameters(), trained))
    adapter = sum(p.nbytes for name, p in model.named_parameters() if ".lora_" in name)
    by_layer = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    # bitsandbytes keeps small tensors in 32 bits, and two scales for each block of 256 values.
    small = 2 * sum(p.nbytes for p in trained if not (step.eight_bit and p.numel() >= 4096))
    large = (2 + 8 / 256) * sum(p.numel() for p in trained if step.eight_bit and p.numel() >= 4096)
    found: dict[str, float] = {
        "weights": weights / step.shards,
        "gradients": gradients / step.shards * (2 if step.buckets else 1),
        "update rule": step.copies * gradients,
        "AdamW": (small + large) / step.shards,
        "frozen models": step.frozen * (weights - adapter) / step.shards,
        # With gradients: what is outside the layers, one layer, and the one that is prefetched.
        "gathered": 2 * (weights - sum(by_layer)) + 3 * max(by_layer, default=0) if step.shards > 1 else 0,
        "logits": _logits(model.config.get_text_config().vocab_size, step),
    }
    # Some models do not run on shapes, such as mixtures of experts; an estimate must not end a run.
    with suppress(Exception):
        found["activations"] = _activations(model, layers, step)
    return {name: value for name, value in found.items() if value}


def _logits(vocabulary: int, step: Step) -> float:
    """Bytes that the head keeps and works on."""
    logits, at_work = step.rows * (step.width - 1) * vocabulary, 0
    if step.reads_logits:
        # For half of the rows: two models' logits and log-probs, probabilities, differences, products, a gradient.
        logits //= 2
        at_work = 8 * (logits if logits <= head.LOGITS_BUDGET else head.per_token_chunk(step.gpu))
    kept = logits if logits <= (head.GPU_LOGITS_BUDGET if step.gpu else head.LOGITS_BUDGET) else 0
    # A chunk of logits and its gradient.
    return 4.0 * (kept + max(at_work, 2 * min(head.GPU_CHUNK if step.gpu else head.CPU_CHUNK, logits)))


def _activations(model: Any, layers: nn.ModuleList, step: Step) -> float:
    """Bytes, without weights, that a forward pass keeps for the backward pass; runs the model on fake tensors.

    With checkpointing only the input of each layer is kept, except for the layer that is computed. Autocast keeps
    16-bit copies of all trained weights until the forward pass ends.
    """
    copies = 2 * step.autocast * sum(p.numel() for p in layers.parameters() if p.requires_grad and p.ndim >= 2)
    # The first layers represent all. Bytes kept by each of them and, last, outside.
    share = len(layers) / len(layers[:LAYERS])
    del layers[LAYERS:]
    kept, inputs = [0] * (len(layers) + 1), [0] * len(layers)
    seen: dict[int, Any] = {}
    place = -1

    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal place
        place = number[layer]
        inputs[place] = (args[0] if args else kwargs["hidden_states"]).nbytes

    def leave(*_: Any) -> None:
        nonlocal place
        place = -1

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            kept[place] += storage.nbytes()
            seen[storage._cdata] = storage
        return tensor

    number = {layer: n for n, layer in enumerate(layers)}
    for layer in layers:
        layer.register_forward_pre_hook(enter, with_kwargs=True)
        layer.register_forward_hook(leave)
    fake, mixed = FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", enabled=step.autocast)
    with fake, mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Fake CPU tensors: the meta device has other kernels.
        model.train().to_empty(device="cpu")
        seen = {weight.untyped_storage()._cdata: weight for weight in model.parameters()}
        cells = torch.arange(step.rows * step.width)
        lengths = cells.new_full((2, step.rows), step.width)
        layout = Layout(step.rows, step.width, cells, cells, False, (cells % step.width).unsqueeze(0), cells, lengths)
        packed_hidden(model.base_model, cells.view(step.rows, step.width), layout)
    *by_layer, outside = kept
    return outside + (share * sum(inputs) + max(copies, *by_layer) if step.checkpointing else share * sum(by_layer))
