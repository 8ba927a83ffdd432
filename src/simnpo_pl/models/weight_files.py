"""A model whose weights stay in their files until it is sharded: a process then reads its own slices alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


class WeightFiles:
    """Tensors of safetensors files by name, read when they are asked for.

    Args:
        files: Paths.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._file: dict[str, Any] = {}
        for path in files:
            file: Any = safe_open(path, framework="pt")
            self._file |= dict.fromkeys(file.keys(), file)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file.items()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """A tensor, or some of its rows."""
        return self._file[name].get_slice(name)[rows]


def model_on_disk(build: Callable[[], Any], files: WeightFiles) -> Any:
    """A model with real buffers, but weights that hold no values and take no memory before they are written to.

    Args:
        build: Gives the model from its config.
        files: Its weights; they are kept as the model's `weight_files`.

    Returns:
        The model; None where the files do not hold its tensors one by one under its own names.
    """
    with _weights_without_values():
        model = build()
    model.tie_weights()
    persistent = dict(model.state_dict(keep_vars=True))
    buffers = {name: value for name, value in persistent.items() if not isinstance(value, nn.Parameter)}
    wanted = {name: tuple(value.shape) for name, value in (*model.named_parameters(), *buffers.items())}
    if files.shapes != wanted:
        return None
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                # The system gives pages of memory to what is written, and these are not: not even by zeros.
                fresh = nn.Parameter(torch.empty_like(weight, device="cpu"), weight.requires_grad)
                module._parameters[name] = made.setdefault(weight, fresh)
    for name, value in buffers.items():
        value.copy_(files.read(name))
    model.weight_files = files
    return model


def fill_shards(model: Any, rank: int, processes: int) -> None:
    """Read this process's rows of every weight.

    Args:
        model: Sharded along the first dimension; does nothing unless it is a `model_on_disk`.
        rank: This process among those that share the model.
        processes: Their number.
    """
    files = model.__dict__.pop("weight_files", None)
    if files is None:
        return
    for name, weight in model.named_parameters():
        # An adapter is new, and its layer's own weight stands one level deeper than in the file.
        if ".lora_" not in name:
            local = weight.to_local().detach()
            start = min(-(-weight.shape[0] // processes) * rank, weight.shape[0])
            local.copy_(files.read(name.replace(".base_layer.", "."), slice(start, start + len(local))))


def named_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model one by one, from its files where it is a `model_on_disk`; tied ones once."""
    files = getattr(model, "weight_files", None)
    for name, weight in sorted(model.named_parameters()):
        yield name, weight.detach() if files is None else files.read(name).to(weight.dtype)


@contextmanager
def _weights_without_values() -> Iterator[None]:
    """Modules made inside get their parameters on the meta device; buffers are real."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(self, name, parameter)

    module: Any = nn.Module
    module.register_parameter = on_meta
    try:
        yield
    finally:
        module.register_parameter = register
