"""The layers of a transformer by number, and the parameters of a model by name."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from simnpo_pl.utils.errors import UserError


def body_of(model: Any) -> Any:
    """The transformer of a causal language model, without its head."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def layers_of(model: Any) -> nn.ModuleList:
    """The list of a model's layers; raises UserError where it has none."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} keeps its {count} layers in no list: their states cannot be read")


def compile_layers(model: Any) -> None:
    """Compile the layers for training, in place: a deepcopy of the model would compute with this one's layers."""
    for layer in layers_of(model):
        layer.forward = _compiled(layer)


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    plain, fused = layer.forward, torch.compile(layer.forward, dynamic=True)
    return wraps(plain)(lambda *a, **k: (fused if layer.training and torch.is_grad_enabled() else plain)(*a, **k))


@contextmanager
def layer_outputs(model: Any, layers: Collection[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Outputs `(B * T, D)` of layers, numbered from 0, in each forward pass inside the context."""
    outputs: dict[int, list[Tensor]] = {number: [] for number in layers}

    def keep(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[number].append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))

        return hook

    found = layers_of(model) if layers else nn.ModuleList()
    handles = [found[number].register_forward_hook(keep(number)) for number in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_outputs(model: Any, layer: int, at: Tensor, states: Tensor) -> Iterator[None]:
    """Puts `states` `(S, D)` in the place of outputs of a layer, from 0, in the forward passes inside the context.

    The outputs are `(N, D)` over all passes, one after the other; `at` `(S,)` says which of the N are replaced.
    """
    done = 0

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal done
        hidden = output[0] if isinstance(output, tuple) else output
        flat = hidden.flatten(0, 1).clone()
        inside = (at >= done) & (at < done + len(flat))
        flat[at[inside] - done] = states[inside].to(flat)
        done += len(flat)
        return (flat.view_as(hidden), *output[1:]) if isinstance(output, tuple) else flat.view_as(hidden)

    handle = layers_of(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def beside_text(model: Any) -> list[str]:
    """Names of the modules that text does not pass through, such as those for images."""
    if model.config.get_text_config() is model.config:
        return []
    used = {m for part in filter(None, (model.get_decoder(), model.get_output_embeddings())) for m in part.modules()}
    return [name for name, module in model.named_modules() if module not in used]


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze all parameters but those whose whole name one of the regular expressions matches; only text's are."""
    beside = set(beside_text(model))
    # Tied weights have two names.
    names = {n: w for n, w in model.named_parameters(remove_duplicate=False) if n.rpartition(".")[0] not in beside}
    model.requires_grad_(False)
    for pattern in patterns:
        try:
            found = [weight for name, weight in names.items() if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(f"--model.trainable {pattern!r} is no regular expression ({error})") from error
        if not found:
            raise UserError(f"--model.trainable {pattern!r} matches no parameter; match a name, such as {[*names][1]}")
        for weight in found:
            weight.requires_grad_()
