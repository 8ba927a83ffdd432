"""FSDP2, PyTorch's `fully_shard`, under Lightning: weights, gradients and optimizer state sharded over all devices.

`--trainer.strategy fsdp2`. A checkpoint is a folder with a file of every process; the exported model is gathered.
Lightning's own way of reading such a checkpoint unpickles its index, which can run code, and needs every weight in it,
which the checkpoint of an adapter does not have. `SafeReader` and `ShardedStrategy.load_checkpoint` replace it.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from simnpo_pl.models.layers import body_of, layers_of
from simnpo_pl.utils.errors import UserError

INDEX, REST = ".metadata", "meta.pt"


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard a model in place, layer by layer; the weights come from the first process.

    Embeddings, last norm and head are one group, which stays gathered between a forward pass and its backward pass:
    the head is applied to some positions only, after the pass. On all processes but the first the model is on the meta
    device, see `load_causal_lm(sharded=True)`. The mesh has one dimension.
    """
    first = mesh.get_local_rank() == 0
    weights = model.state_dict() if first else {}
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if not first:
        model.to_empty(device=mesh.device_type)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    # A state dict lacks some buffers, such as the frequencies of rotary positions.
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, src=0)

    def body(self: Any, **inputs: Any) -> Any:
        return body_of(self)(**inputs)

    model.run_body = MethodType(body, model)
    model.mesh = mesh
    register_fsdp_forward_method(model, "run_body")


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on any process."""
    number = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
    return bool(number)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, without tensor parallelism."""

    strategy_name = "fsdp2"

    def setup_environment(self) -> None:
        # By default Lightning uses the devices of a machine for tensor parallelism; their number is known only now.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the weights and optimizer state of a checkpoint, on any number of processes; returns the rest.

        Raises:
            UserError: It is no sharded checkpoint, or lacks weights that are trained.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not (path / INDEX).is_file() or not (path / REST).is_file():
            raise UserError(f"--ckpt_path {path} is no complete checkpoint of a sharded run; give the folder it saved")
        reader = SafeReader(path)
        known = reader.read_metadata().state_dict_metadata
        assert self.model is not None
        weights = get_model_state_dict(self.model)
        kept = {name: weight for name, weight in weights.items() if f"state_dict.{name}" in known}
        missing = [name for name, weight in self.model.named_parameters() if weight.requires_grad and name not in kept]
        if missing:
            raise UserError(f"--ckpt_path {path} lacks the weights {missing[0]}: give the options of its run")
        load({"state_dict": kept}, storage_reader=reader)
        set_model_state_dict(self.model, kept, options=StateDictOptions(strict=False))
        for number, optimizer in enumerate(self.optimizers):
            state = get_optimizer_state_dict(self.model, optimizer)
            load({f"optimizer_{number}": state}, storage_reader=reader)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state)
        return torch.load(path / REST, weights_only=True)


class SafeReader(FileSystemReader):
    """Reads a sharded checkpoint without running code: its index is a pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            try:
                index: Metadata = _Unpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
                raise UserError(f"--ckpt_path {self.path}: no index of a checkpoint ({error}); use another") from error
        # What the base class sets on an index that it has read.
        index.storage_meta = getattr(index, "storage_meta", None) or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Unpickler(pickle.Unpickler):
    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    NAMES = frozenset({("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")})

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if "." not in name and (module in self.MODULES or (module, name) in self.NAMES or dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not part of one")


StrategyRegistry.register(
    ShardedStrategy.strategy_name, ShardedStrategy, "FSDP2: weights, gradients and optimizer state on all devices"
)


def gathered(strategy: Any) -> Mapping[str, Tensor]:
    """All weights of the model, on the first process at least; every process has to call this."""
    if isinstance(strategy, ShardedStrategy):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(strategy.model, options=options)  # type: ignore[arg-type,return-value]
    return strategy.lightning_module_state_dict()
