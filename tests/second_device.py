"""A second device on a machine without one: mixing it with the CPU fails as on CUDA, and host waits are counted.

Its tensors are torch's `PrivateUse1` over CPU memory: every operation runs the CPU's kernel on the same memory, which
DLPack passes between the two devices without a copy. Lightning takes it for its CUDA device, so commands need no
options to run on it. It does not show speed, memory, several devices, or what a GPU's kernels round.

Importing this changes global settings of torch and Lightning, so do it in a process of its own, see `in_child`.
"""

import ctypes
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.accelerators.cuda import CUDAAccelerator as FabricCUDAAccelerator
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
PACKAGE = f"{Path(__file__).parents[1] / 'src' / 'simnpo_pl'}/"
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
DLPACK_CPU, DLPACK_EXTENSION = 1, 12

WAITS = {"_local_scalar_dense": "item", "nonzero": "nonzero", "_unique2": "unique", "bincount": "bincount"}
"""Operations whose result's value or shape the host needs; boolean indices are found by `nonzero`."""
COPIES = ("copy_", "_copy_from")
"""Operations over two devices."""
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take indices from the host, as CUDA does: they are copied."""
SHAPES = ("view", "as_strided", "_reshape_alias", "unfold", "view_as_real", "set_", "resize_")
"""Operations on shape and storage alone, whose CPU kernel fits any device."""
FIRST = ("empty.memory_format", "empty_strided", "copy_", "_copy_from", "_local_scalar_dense")
FIRST += ("as_strided", "view", "_reshape_alias")
"""Operations that do not reach a fallback."""
LOW = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "einsum", "scaled_dot_product_attention")
"""What autocast runs in the low precision."""
HIGH = ("exp", "log", "log1p", "expm1", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt", "reciprocal", "prod")
HIGH += ("logsumexp", "softmax.int", "log_softmax.int", "cumsum", "cumprod", "sum", "sum.dim_IntList", "norm.Scalar")
HIGH += ("nll_loss", "mse_loss", "kl_div", "layer_norm", "cosine_similarity", "softplus")
"""What autocast runs in float32."""


class _Backend(_DummyBackendModule):
    """What torch and Lightning ask of `torch.second`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device(self, index: int) -> Any:
        return nullcontext()

    def get_rng_state(self, index: int = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, index: int = 0) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None: ...
    def set_device(self, index: int) -> None: ...
    def synchronize(self, index: int = 0) -> None: ...
    def _lazy_init(self) -> None: ...


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
# `parameter.data = ...` is refused across these devices; swapped parameters keep tied weights tied.
torch.__future__.set_swap_module_params_on_conversion(True)
# A forked process has no threads for the backward pass of a device that its parent did not know.
torch.autograd.set_multithreading_enabled(False)

# -- host waits ----------------------------------------------------------------------------------------------

_waits: Counter[tuple[str, str]] | None = None


class Waits(Callback):
    """Writes down the host waits of every batch: optimizer steps, scored batches, tokens of generated ones."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, *args: Any) -> None:
        self.counting = host_waits()
        self.seen = self.counting.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        self._write("step", 1)

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        self._write("token", batch["max_new_tokens"]) if "prompts" in batch else self._write("scores", 1)

    on_validation_batch_start = on_train_batch_start

    def _write(self, kind: str, parts: int) -> None:
        self.counting.__exit__(None, None, None)
        lines = {" ".join(key): count for key, count in sorted(self.seen.items())}
        with self.file.open("a") as file:
            print(json.dumps([kind, self.seen.total() / parts, lines]), file=file)


@contextmanager
def host_waits() -> Iterator[Counter[tuple[str, str]]]:
    """Counts what makes the host wait for a GPU, by its kind and the line of the package that asked for it."""
    global _waits
    before, _waits = _waits, Counter()
    try:
        yield _waits
    finally:
        _waits = before


def _count(kind: str) -> None:
    if _waits is not None:
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        line = "elsewhere" if frame is None else f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
        _waits[kind, line] += 1


def _inspect(op: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    """Count waits; refuse tensors of two devices."""
    if name in WAITS:
        _count(WAITS[name])
    elif name == "copy_" and args[0].device.type == "cpu":
        _count("to host")
    elif name == "_index_put_impl_" and any(i is not None and i.dtype == torch.bool for i in args[1]):
        _count("nonzero")
    # A CPU tensor without dimensions counts as a number.
    if name in COPIES or len({t.device.type for t in tensors if t.dim() or t.device.type == NAME}) < 2:
        return
    if name in INDEXED and all(t.device.type == NAME or not t.dim() for t in (args[0], *args[2:3])):
        return
    raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({op})")


# -- operations ----------------------------------------------------------------------------------------------

_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _same_memory(tensor: Tensor, kind: int) -> Tensor:
    """The tensor as one of another device."""
    capsule = torch._C._to_dlpack(tensor if type(tensor) is Tensor else tensor.detach())
    # The capsule begins with the address of the memory, then kind and number of the device.
    (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + 8)[:] = (kind, 0)
    return torch._C._from_dlpack(capsule)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to an argument or result, or to each element of a list of them."""
    return type(value)(map(function, value)) if isinstance(value, list | tuple) else function(value)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type == NAME:
        return _same_memory(value, DLPACK_CPU)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _to_second(value: Any) -> Any:
    return _same_memory(value, DLPACK_EXTENSION) if isinstance(value, Tensor) else value


class _Operation:
    """An operation that runs by the CPU's kernel."""

    def __init__(self, op: Any) -> None:
        self.op, self.name = op, op._schema.name.removeprefix("aten::")
        arguments = op._schema.arguments
        self.names = [a.name for a in arguments]
        self.tensors = {a.name for a in arguments if str(a.type) == "Tensor"}
        self.outs = [a.name for a in arguments if a.is_out]
        written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self.written = written if op._schema.returns else []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.name in SHAPES:
            return self.op.redispatch(CPU_KEYS, *args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        given.pop("pin_memory", None)
        found: list[Tensor] = []
        for value in given.values():
            found += [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]
        _inspect(self.op, self.name, args, found)
        on_cpu = {key: _map(_to_cpu, value) for key, value in given.items()}
        for key in self.tensors:
            # A number in place of a tensor arrives as a number.
            if isinstance(value := given.get(key), int | float):
                on_cpu[key] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        if self.name == "_copy_from":
            on_cpu["dst"].copy_(on_cpu["self"])
            return given["dst"]
        # Memory that came by DLPack cannot grow, so a result of another size takes its place.
        outs = {key: torch.empty(0, dtype=given[key].dtype) for key in self.outs}
        result = self.op(**on_cpu | outs)
        for key, out in outs.items():
            if out.shape == given[key].shape:
                on_cpu[key].copy_(out)
            else:
                new = _to_second(out)
                replace = torch.ops.aten.set_.source_Storage_storage_offset.redispatch
                replace(CPU_KEYS, given[key], new.untyped_storage(), 0, new.shape, new.stride())
        if self.written:
            written = tuple(given[key] for key in self.written)
            return written[0] if len(written) == 1 else written
        return _map(_to_second, result)


_operation = functools.cache(_Operation)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    return _operation(op)(*args, **kwargs)


def _low() -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _cast(op: Any, dtype: Callable[[], torch.dtype], *args: Any, **kwargs: Any) -> Any:
    """Run an operation in autocast's precision."""

    def cast(x: Any) -> Any:
        own = isinstance(x, Tensor) and x.device.type == NAME and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype()) if own else x

    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return op(*(_map(cast, x) for x in args), **kwargs)


def _overload(full: str) -> Any:
    name, _, overload = full.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload or "default")


_all, _own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_all.fallback(_run, "PrivateUse1")
_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _name in FIRST:
    _own.impl(_name, _operation(_overload(_name)), "PrivateUse1")
for _names, _dtype in ((LOW, _low), (HIGH, lambda: torch.float32)):
    for _name in _names:
        _own.impl(_name, functools.partial(_cast, _overload(_name), _dtype), "AutocastPrivateUse1")

_deepcopy = Tensor.__deepcopy__


def _copied(self: Tensor, memo: dict[int, Any]) -> Any:
    """A storage of this device cannot be copied by itself."""
    if self.device.type != NAME or type(self) is not Tensor:
        return _deepcopy(self, memo)
    return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))


Tensor.__deepcopy__ = _copied  # type: ignore[method-assign]

# -- Lightning's GPU -----------------------------------------------------------------------------------------

CUDAAccelerator.is_available = FabricCUDAAccelerator.is_available = staticmethod(lambda: True)
CUDAAccelerator.auto_device_count = staticmethod(lambda: 1)
CUDAAccelerator.parse_devices = staticmethod(lambda devices: [0])
CUDAAccelerator.get_parallel_devices = staticmethod(lambda devices: [DEVICE])
for _name in ("setup_device", "setup", "teardown"):
    setattr(CUDAAccelerator, _name, lambda *_: None)
_mixed = MixedPrecision.__init__


def _mixed_on_second(self: Any, precision: Any, device: str, scaler: Any = None) -> None:
    _mixed(self, precision, NAME if device == "cuda" else device, scaler)


MixedPrecision.__init__ = _mixed_on_second  # type: ignore[method-assign]
