"""Models whose weights are read after they are sharded: nothing is read before, and what is read is the file's."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.lora import LoraOptions, add_adapter
from simnpo_pl.models.weight_files import WeightFiles, fill_shards
from simnpo_pl.utils.errors import UserError


def as_sharded(model: nn.Module, rank: int, processes: int) -> nn.Module:
    """Leave each weight with the rows that one of several processes would hold, as FSDP2 does."""
    for module in model.modules():
        for name, weight in [(n, w) for n, w in module._parameters.items() if w is not None]:
            chunks = weight.detach().chunk(processes)
            own = chunks[rank].clone() if rank < len(chunks) else weight.detach()[:0].clone()
            module._parameters[name] = Shared(own, weight.shape)
    return model


class Shared(nn.Parameter):
    def __new__(cls, own: Tensor, shape: torch.Size) -> "Shared":
        made = super().__new__(cls, own, False)
        made.whole = shape
        return made

    @property
    def shape(self) -> torch.Size:
        return self.whole

    def to_local(self) -> Tensor:
        return self.data


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("adapter", [False, True])
def test_shares_add_up_to_the_files(model_folder: Path, processes: int, adapter: bool):
    """Also where the number of processes divides no weight, and where some process has no row."""
    expected = load_file(model_folder / "model.safetensors")
    shares: dict[str, list[Tensor]] = {}
    for rank in range(processes):
        model = load_causal_lm(str(model_folder), sharded=True)
        assert isinstance(model.weight_files, WeightFiles)
        if adapter:
            add_adapter(model, LoraOptions(rank=2))
        fill_shards(as_sharded(model, rank, processes), rank, processes)
        assert not hasattr(model, "weight_files")
        for name, weight in model.named_parameters():
            if ".lora_" not in name:
                shares.setdefault(name.replace(".base_layer.", "."), []).append(weight.to_local().clone())
    assert shares.keys() == expected.keys()
    for name, parts in shares.items():
        assert torch.equal(torch.cat(parts), expected[name]), name


def test_adapter_is_the_one_of_a_model_that_was_read(model_folder: Path):
    models = [load_causal_lm(str(model_folder), sharded=sharded) for sharded in (False, True)]
    known = [add_adapter(model, LoraOptions(rank=2)) for model in models]
    assert known[0] == known[1]
    weights = [{n: w for n, w in model.named_parameters() if ".lora_" in n} for model in models]
    assert weights[0]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def test_model_is_otherwise_the_same(model_folder: Path):
    read, on_disk = (load_causal_lm(str(model_folder), sharded=sharded) for sharded in (False, True))
    assert on_disk.generation_config.to_dict() == read.generation_config.to_dict()
    assert on_disk.config.to_dict() == read.config.to_dict()
    assert on_disk.name_or_path == read.name_or_path
    assert not on_disk.training
    buffers = dict(read.named_buffers())
    assert buffers
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in on_disk.named_buffers())


@pytest.mark.parametrize("change", ["name", "shape", "left over"])
def test_files_of_another_form_are_read_as_a_whole(model_folder: Path, tmp_path: Path, change: str):
    """Or refused, as they would be on one device."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    if change == "name":
        # Without the prefix, as a model without head is saved; transformers finds them.
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    elif change == "left over":
        weights["model.other.weight"] = torch.zeros(2)
    else:
        weights["model.norm.weight"] = torch.zeros(5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if change == "shape":
        with pytest.raises(UserError, match=r"--model\.name: the model in .* cannot be loaded"):
            load_causal_lm(str(folder), sharded=True)
    else:
        model = load_causal_lm(str(folder), sharded=True)
        assert not hasattr(model, "weight_files")
        own = load_causal_lm(str(model_folder)).state_dict()
        assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())
