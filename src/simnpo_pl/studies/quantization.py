"""Quantisation: the exported model is evaluated again with its weights rounded to few bits, by torchao.

Unlearning moves weights little; rounding them may bring back what was forgotten (Zhang et al. 2024, "Catastrophic
Failure of LLM Unlearning via Quantization").
"""

import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from simnpo_pl.models.lora import require_merged
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import add_results, reopen
from simnpo_pl.utils.errors import UserError


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded: symmetrically, to the nearest step; activations stay as they are.

    Args:
        bits: 8 (one scale an output row) or 4 (one scale a group).
        group_size: Neighbouring weights of a row that share a scale at 4 bits; None at 8 bits.
    """

    bits: int
    group_size: int | None = None

    @property
    def key(self) -> str:
        """The settings in one line; where results keep the evaluation."""
        return f"{self.bits}-bit" if self.group_size is None else f"{self.bits}-bit group={self.group_size}"


def quantize(model: Any, rounding: Rounding) -> int:
    """Round the weights of all linear layers in place, the output head and embeddings aside.

    Args:
        model: Causal language model from transformers.
        rounding: To how many bits.

    Returns:
        How many weights were rounded.

    Raises:
        UserError: torchao is not installed, there is no linear layer, or a row is no whole number of groups.
    """
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    except ModuleNotFoundError as error:
        raise UserError(f"quantisation needs {error.name}: pip install 'simnpo_pl[quantize]'") from error
    require_merged(model, "RUN/model")
    head = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not layers:
        raise UserError(f"{type(model).__name__} has no linear layer whose weights could be rounded")
    for name, layer in layers.items():
        if rounding.group_size is not None and layer.in_features % rounding.group_size:
            common = math.gcd(*(one.in_features for one in layers.values()))
            fitting = max(size for size in range(1, min(rounding.group_size, common) + 1) if common % size == 0)
            raise UserError(
                f"--group_size {rounding.group_size} does not divide the {layer.in_features} inputs of {name}; give a "
                f"divisor of {common}, such as {fitting}"
            )
    rounded = sum(layer.weight.numel() for layer in layers.values())
    granularity = PerAxis(0) if rounding.group_size is None else PerGroup(rounding.group_size)
    config = IntxWeightOnlyConfig(getattr(torch, f"int{rounding.bits}"), granularity)
    quantize_(model, config, filter_fn=lambda module, name: name in layers)
    return rounded


def evaluate_rounded(run: Run, rounding: Rounding) -> None:
    """Evaluate a run's model after rounding, and add the metrics to the run's results unless they are there."""
    if rounding.key in run.record.get("quantized", {}):
        return
    opened = reopen(run)
    trainer: Any = opened.trainer
    model = opened.model.like(opened.model.name)
    model.configure_model()
    rounded = quantize(model.policy, rounding)
    if trainer.is_global_zero:
        print(f"{run.name}: {rounded / 1e6:.1f} million weights rounded to {rounding.bits} bits", flush=True)
    trainer.validate(model, datamodule=opened.datamodule, verbose=False)
    result = model.evaluation_result
    assert result is not None
    settings = {**asdict(rounding), "weights": rounded, "torchao": version("torchao")}
    if trainer.is_global_zero:
        entry = {"settings": settings, "metrics": result.values, "counts": result.counts}
        add_results(run, lambda content: content.setdefault("quantized", {}).update({rounding.key: entry}))
