"""Evaluate finished runs again after their weights were rounded to 8 or 4 bits by torchao, or to NF4 by bitsandbytes.

Rounding may bring back what was forgotten, because unlearning changes weights little (Zhang et al. 2024, "Catastrophic
Failure of LLM Unlearning via Quantization"). All linear layers of the run's model/ except its output head are rounded,
8 and 4 bits symmetrically: 8 bits with one scale per output row, 4 bits with one per group; NF4 (Dettmers et al. 2023)
with one scale per 64 weights. What a run's results.json already holds is skipped.
"""

import math
from argparse import Namespace
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from simnpo_pl.models.lora import require_merged
from simnpo_pl.report.robustness import quantized_table
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import measure_once, reopen, runs_of
from simnpo_pl.utils.errors import UserError

NF4: Literal["nf4"] = "nf4"
Bits = int | Literal["nf4"]
NAMES: dict[Bits, str] = {8: "8 bits", 4: "4 bits", NF4: "NF4"}


def run(options: Namespace) -> None:
    runs = runs_of(options)
    for one in runs:
        for bits in options.bits:
            measure(one, bits, options.group_size if bits == 4 else None)
    rank_zero_only(print)(quantized_table(runs))


def measure(run: Run, bits: Bits, group_size: int | None = None) -> None:
    """Add the metrics of a run's rounded model to its results, unless they hold them already."""
    key = NF4 if bits == NF4 else f"{bits}-bit" + ("" if group_size is None else f" group={group_size}")
    measure_once(run, "quantized", key, evaluate_rounded, bits, group_size)


def evaluate_rounded(run: Run, bits: Bits, group_size: int | None) -> dict[str, Any]:
    """Settings, metrics and counts of a run's model after rounding."""
    opened = reopen(run)
    trainer: Any = opened.trainer
    model = opened.model.like(opened.model.name)
    model.configure_model()
    rounded = quantize(model.policy, bits, group_size)
    rank_zero_only(print)(f"{run.name}: {rounded / 1e6:.1f} million weights rounded to {NAMES[bits]}", flush=True)
    trainer.validate(model, datamodule=opened.datamodule, verbose=False)
    result = model.evaluation_result
    assert result is not None
    package = "bitsandbytes" if bits == NF4 else "torchao"
    settings = {"bits": bits, "group_size": group_size, "weights": rounded, package: version(package)}
    found = {"metrics": result.values, "counts": result.counts, "unavailable": result.unavailable}
    return {"settings": settings, **found}


def quantize(model: Any, bits: Bits, group_size: int | None = None) -> int:
    """Round the weights of all linear layers in place, except output head and embeddings; how many were rounded.

    `group_size` weights of an output row share a scale; None gives each row one scale.
    """
    package, extra = ("bitsandbytes", "8bit") if bits == NF4 else ("torchao", "quantize")
    if find_spec(package) is None:
        raise UserError(f"rounding to {NAMES[bits]} needs {package}: pip install 'simnpo_pl[{extra}]'")
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
    if bits == NF4:
        _round_to_nf4(layers.values())
    else:
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

        granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
        config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity)
        quantize_(model, config, filter_fn=lambda module, name: name in layers)
        # torchao's tensors have no gradient, and DDP cannot broadcast them.
        for layer in layers.values():
            layer.weight = nn.Parameter(layer.weight.dequantize())
    return sum(layer.weight.numel() for layer in layers.values())


@torch.no_grad()
def _round_to_nf4(layers: Iterable[nn.Linear]) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for layer in layers:
        # Flat, because on a CPU rows whose width is no multiple of a block come back wrong.
        rounded = dequantize_4bit(*quantize_4bit(layer.weight.flatten(), blocksize=64, quant_type=NF4))
        layer.weight.copy_(rounded.view_as(layer.weight))
