"""Evaluate finished runs again after their weights were rounded to 8 or 4 bits, by torchao.

Rounding may bring back what was forgotten, because unlearning changes weights little (Zhang et al. 2024, "Catastrophic
Failure of LLM Unlearning via Quantization"). All linear layers of the run's model/ except its output head are rounded,
symmetrically: 8 bits with one scale per output row, 4 bits with one per group. What a run's results.json already holds
is skipped.
"""

import math
from argparse import Namespace
from importlib.metadata import version
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from simnpo_pl.models.lora import require_merged
from simnpo_pl.report.robustness import quantized_table
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import finished_runs, measure_once, reopen
from simnpo_pl.utils.errors import UserError


def run(options: Namespace) -> None:
    runs = finished_runs(options.runs)
    settings = {"8-bit": (8, None), f"4-bit group={options.group_size}": (4, options.group_size)}
    for one in runs:
        for key, (bits, group_size) in settings.items():
            if bits in options.bits:
                measure_once(one, "quantized", key, evaluate_rounded, bits, group_size)
    rank_zero_only(print)(quantized_table(runs))


def evaluate_rounded(run: Run, bits: int, group_size: int | None) -> dict[str, Any]:
    """Settings, metrics and counts of a run's model after rounding."""
    opened = reopen(run)
    trainer: Any = opened.trainer
    model = opened.model.like(opened.model.name)
    model.configure_model()
    rounded = quantize(model.policy, bits, group_size)
    rank_zero_only(print)(f"{run.name}: {rounded / 1e6:.1f} million weights rounded to {bits} bits", flush=True)
    trainer.validate(model, datamodule=opened.datamodule, verbose=False)
    result = model.evaluation_result
    assert result is not None
    settings = {"bits": bits, "group_size": group_size, "weights": rounded, "torchao": version("torchao")}
    return {"settings": settings, "metrics": result.values, "counts": result.counts}


def quantize(model: Any, bits: int, group_size: int | None = None) -> int:
    """Round the weights of all linear layers in place, except output head and embeddings; how many were rounded.

    Args:
        model: Causal language model from transformers.
        bits: 8 or 4.
        group_size: Weights of an output row that share a scale; None gives each row one scale.
    """
    try:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    except ModuleNotFoundError as error:
        raise UserError(f"quantization needs {error.name}: pip install 'simnpo_pl[quantize]'") from error
    require_merged(model, "RUN/model")
    head = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if not layers:
        raise UserError(f"{type(model).__name__} has no linear layer whose weights could be rounded")
    for name, layer in layers.items():
        if group_size is not None and layer.in_features % group_size:
            common = math.gcd(*(one.in_features for one in layers.values()))
            fitting = max(size for size in range(1, min(group_size, common) + 1) if common % size == 0)
            raise UserError(
                f"--group_size {group_size} does not divide the {layer.in_features} inputs of {name}; give a divisor "
                f"of {common}, such as {fitting}"
            )
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity)
    quantize_(model, config, filter_fn=lambda module, name: name in layers)
    return sum(layer.weight.numel() for layer in layers.values())
