"""The layers of a transformer by number, and the parameters of a model by name."""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from simnpo_pl.utils.errors import UserError


def body_of(model: Any) -> Any:
    """The transformer of a causal language model, without its head."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def layers_of(model: Any) -> nn.ModuleList:
    """The list of a model's layers; raises UserError where it has none."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} keeps its {count} layers in no list: their states cannot be read")


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


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze all parameters but those whose whole name one of the regular expressions matches."""
    try:
        expressions = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"--model.trainable {list(patterns)} contains no regular expression ({error})") from error
    trained = {n for n, _ in model.named_parameters() if any(e.fullmatch(n) for e in expressions)}
    if not trained:
        names = ", ".join(name for name, _ in list(model.named_parameters())[1:4])
        raise UserError(
            f"--model.trainable {list(patterns)} matches no parameter; an expression must match a whole name, "
            f"such as {names}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
