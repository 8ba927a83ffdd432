"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft, and the base without its adapter as the reference.

Not by `add_adapter`, `disable_adapters` and `save_pretrained` of transformers (5.24), which refuse peft before 0.22 and
may ask the hub for the base's config.
"""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from simnpo_pl.models.layers import beside_text
from simnpo_pl.models.logprobs import AnswerStates, Rows, Scorer
from simnpo_pl.utils.errors import UserError, positive
from simnpo_pl.utils.files import read_json

ADAPTER = "default"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass
class LoraOptions:
    """A low-rank adapter on the linear layers; the base stays frozen.

    Args:
        rank: Rank r of the update `(alpha / r) * B A` of a layer's weights.
        alpha: Numerator of the update's scale.
        dropout: Probability with which an input of the adapter is dropped in training.
        target_modules: Names of the layers to adapt, such as [q_proj, v_proj]; null takes every linear layer but the
            head.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"--model.lora.rank must be at least 1, got {self.rank}")
        positive("--model.lora.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise UserError(f"--model.lora.dropout must be at least 0 and below 1, got {self.dropout}")
        if self.target_modules is not None and not self.target_modules:
            raise UserError("--model.lora.target_modules names no layer; give names such as [q_proj, v_proj], or null")


def add_adapter(model: Any, options: LoraOptions) -> dict[str, Any]:
    """Freeze a model and add a new adapter, which changes nothing yet.

    Returns:
        Base, rank, scale and layers: a checkpoint of this adapter fits no other, see `check_adapter`.
    """
    require_merged(model, "--model.name")
    base = base_fingerprint(model)
    config = inject_adapter(model, options)
    folder = Path(model.name_or_path).expanduser()
    # The adapter's folder names its base, from whatever folder it is read.
    config.base_model_name_or_path = str(folder.resolve()) if folder.is_dir() else model.name_or_path
    config.inference_mode = True
    layers = sorted({n.rsplit(".lora_", 1)[0] for n, parameter in model.named_parameters() if parameter.requires_grad})
    return {"base": base, "rank": options.rank, "alpha": options.alpha, "layers": layers}


def inject_adapter(model: Any, options: LoraOptions) -> Any:
    """The part of `add_adapter` that reads no weights; returns peft's config."""
    peft = _peft()
    size = {"r": options.rank, "lora_alpha": options.alpha, "lora_dropout": options.dropout}
    layers = {"target_modules": options.target_modules or "all-linear", "exclude_modules": beside_text(model) or None}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **size, **layers)
    # The adapter's weights follow only from the run's seed, so they are the same on every process.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Tied weights are refused below.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
        try:
            peft.inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:
            raise UserError(f"--model.lora: {' '.join(str(error).split())[:300]}") from error
    _refuse_tied(model, "--model.lora.target_modules")
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Small updates would fall below the resolution of a base in half precision.
            parameter.data = parameter.data.float()
    return config


def has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def require_merged(model: Any, option: str) -> None:
    """Raise UserError for a model whose adapter `load_with_adapter` did not merge: it can only be evaluated."""
    if has_adapter(model):
        raise UserError(
            f"{option}: the adapter is not merged, because bfloat16 would round its update; give --model.dtype "
            "float32, or a model that was exported with --export.adapter false"
        )


def save_adapter(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write only the adapter, in peft's format; `state` replaces the model's own weights."""
    weights = _peft().get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[ADAPTER].save_pretrained(folder)
    named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_with_adapter(folder: Path, load_base: Callable[[str], Any], merge: bool, option: str) -> Any:
    """Model of an adapter's folder; without `merge` the adapter stays next to its base in float32."""
    peft = _peft()
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{option}: {folder} contains no {ADAPTER_WEIGHTS}; give an adapter with safetensors weights")
    with base_of(folder, option) as name:
        base = load_base(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model = peft.PeftModel.from_pretrained(base, folder, adapter_name=ADAPTER)
    if not merge:
        return model.get_base_model()
    _refuse_tied(base, option)
    # As any other model; peft freezes the base.
    return model.merge_and_unload(safe_merge=True).requires_grad_(True)


@contextmanager
def base_of(folder: Path, option: str = "--model.name") -> Iterator[str]:
    """Name of an adapter's base; if loading it inside the context fails, the message says where it is named."""
    name = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
    try:
        yield name
    except UserError as error:
        raise UserError(
            f"{option}: {folder} contains an adapter of the base model {name!r}, which cannot be loaded; set "
            f"base_model_name_or_path in its {ADAPTER_CONFIG} to where the base is ({error})"
        ) from error


def _refuse_tied(model: Any, option: str) -> None:
    """Raise UserError for an adapter on weights that another layer uses, too: merged, it would change that layer."""
    uses = Counter(weight for module in model.modules() for weight in module._parameters.values())
    for name, module in model.named_modules():
        base = module.get_base_layer() if hasattr(module, "base_layer") else None
        # Experts of one tensor are adapted by the name of their parameter.
        if base is not None and uses[getattr(base, getattr(module, "parameter_name", "weight"))] > 1:
            raise UserError(
                f"{option}: {name} shares its weights with another layer (tied embeddings), which merging an adapter "
                "would change, too; leave it out"
            )


def base_fingerprint(model: Any) -> str:
    """Hash of some values of every weight; the first process's, which has them before a model is sharded."""
    digest, distributed = hashlib.sha256(), torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        for name, weight in sorted(model.named_parameters()):
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    found = [digest.hexdigest()]
    if distributed:
        torch.distributed.broadcast_object_list(found)
    return found[0]


def check_adapter(saved: dict[str, Any] | None, ours: dict[str, Any] | None) -> None:
    """Raise UserError where a checkpoint was made with another adapter than the policy's.

    Both are what `add_adapter` returned, or None where all weights are trained.
    """
    if (saved is None) is not (ours is None):
        what = ("the whole model", "an adapter") if saved is None else ("an adapter", "the whole model")
        raise UserError(
            f"--ckpt_path: the checkpoint contains {what[0]}, --model.lora trains {what[1]}; give its run's options"
        )
    for key, own in (ours or {}).items():
        if saved is not None and saved.get(key) != own:
            both = f": {saved.get(key)} there, {own} here" if key in ("rank", "alpha") else ""
            raise UserError(
                f"--ckpt_path: the checkpoint's adapter differs in its {key}{both}; give --model.name and --model.lora "
                "as in its run"
            )


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Turn the adapter off, in eval mode and without gradient."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    training, layers = model.training, [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.train(training)


class BaseScorer(Scorer):
    """Scores with the adapter off, given the scorer of the model with its adapter."""

    def __init__(self, scorer: Scorer) -> None:
        self.model, self.forward = scorer.model, scorer.forward
        # Log-probs are taken after the adapter is on again: an adapted head must not be the one that makes them.
        self.head = replace(scorer.head, module=getattr(scorer.head.module, "base_layer", scorer.head.module))

    def __call__(self, parts: Mapping[str, Rows], layers: Collection[int] = ()) -> dict[str, AnswerStates]:
        with adapter_off(self.model):
            return super().__call__(parts, layers)

    def all_logits(self, rows: Rows) -> Tensor:
        with adapter_off(self.model):
            return super().all_logits(rows)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs peft: pip install 'simnpo_pl[lora]'") from error
    return peft
