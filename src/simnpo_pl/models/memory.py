"""Memory of a training step, estimated from a model's shapes before its weights are read; see docs/scale.md."""

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
"""Layers that are run: the period of layers that differ in their attention is no longer than this."""


@dataclass(frozen=True)
class Step:
    """How a model is trained.

    Args:
        rows: Rows of a forward pass on one device, forget and retain rows together.
        width: Tokens in each.
        autocast: Whether matrices are multiplied in 16 bits while weights stay in 32.
        checkpointing: Whether layers are computed again in the backward pass.
        eight_bit: Whether AdamW's moments are kept in 8 bits.
        frozen: Models beside the policy that stay in memory.
        reads_logits: Whether a loss reads whole distributions, not the labels' log-probs alone.
        chunk: Logits at work at once, see `simnpo_pl.models.head`.
        shards: Devices that everything but activations and logits is sharded over.
        buckets: Whether gradients are held a second time, in DDP's buckets.
    """

    rows: int
    width: int
    autocast: bool = False
    checkpointing: bool = False
    eight_bit: bool = False
    frozen: int = 0
    reads_logits: bool = False
    chunk: int = head.GPU_CHUNK
    shards: int = 1
    buckets: bool = False


def training_bytes(model: Any, step: Step) -> dict[str, float]:
    """Bytes on one device by what they are for; `activations` is missing where shapes alone do not run the model.

    Args:
        model: On the meta device, in the types of its weights; what is trained requires a gradient. It is used up.
        step: How it is trained.
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
        "AdamW": (small + large) / step.shards,
        "frozen models": step.frozen * (weights - adapter) / step.shards,
        # With their gradients: what stands outside the layers, a layer, and the one that is fetched ahead.
        "gathered": 2 * (weights - sum(by_layer)) + 3 * max(by_layer, default=0) if step.shards > 1 else 0,
        "logits": _logits(model.config.get_text_config().vocab_size, step),
    }
    # Some models do not run on shapes, such as those that choose experts by value; an estimate must not end a run.
    with suppress(Exception):
        found["activations"] = _activations(model, layers, step)
    return {name: value for name, value in found.items() if value}


def _logits(vocabulary: int, step: Step) -> float:
    """What the head keeps and works on."""
    logits, at_work = step.rows * (step.width - 1) * vocabulary, 0
    if step.reads_logits:
        # Of half of the rows: two models' logits and log-probs, probabilities, differences, products and a gradient.
        logits //= 2
        at_work = 8 * (logits if logits <= head.LOGITS_BUDGET else head.LOGITS_BUDGET // 4)
    kept = logits if logits <= head.LOGITS_BUDGET else 0
    # A chunk of logits and its gradient.
    return 4.0 * (kept + max(at_work, 2 * min(step.chunk, logits)))


def _activations(model: Any, layers: nn.ModuleList, step: Step) -> float:
    """What a forward pass keeps for the backward pass, weights aside: the model's own code on tensors without values.

    Of a layer that is computed again only the input is kept, but for the one at work. Autocast holds 16-bit copies of
    all trained weights until the forward pass ends.
    """
    copies = 2 * step.autocast * sum(p.numel() for p in layers.parameters() if p.requires_grad and p.ndim >= 2)
    # The first layers stand for all. Bytes kept by each of them, and by what stands outside.
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
        for module in model.train().modules():
            # Tensors with a device in place of those on the meta device, which has kernels of its own.
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else torch.empty_like(value, device="cpu")
            for name, weight in module._parameters.items():
                if weight is not None:
                    made = torch.empty_like(weight, device="cpu", requires_grad=False)
                    module._parameters[name] = nn.Parameter(made, weight.requires_grad)
                    seen[made.untyped_storage()._cdata] = made
        cells = torch.arange(step.rows * step.width)
        layout = Layout(step.rows, step.width, cells, cells, False, (cells % step.width).unsqueeze(0))
        packed_hidden(model.base_model, cells.view(step.rows, step.width), layout)
    *by_layer, outside = kept
    return outside + (share * sum(inputs) + max(copies, *by_layer) if step.checkpointing else share * sum(by_layer))
