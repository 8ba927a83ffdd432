"""Where the time of a step goes: operator by operator, beside its multiplications alone."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bench.cases import Case
from bench.data import real_model, scored
from bench.measure import median
from bench.sides import optimizer_step

KINDS = {
    "multiplications": ("mm", "addmm", "bmm", "addmm_", "_linear_pointwise", "convolution", "convolution_backward"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "optimizer and clipping": ("_fused_adamw_", "_foreach_norm", "_foreach_mul_", "linalg_vector_norm"),
    "copies": ("copy_", "cat", "index_select", "index_copy_", "index_add_", "repeat_interleave", "clone", "fill_"),
    "exponentials and softmax of the head": ("exp_", "sub", "amax", "max"),
}
"""Operators by what they are for; the others are element by element: norms, rotations, activations, sums."""


def step_profile(method: str = "SimNPO", layers: int = 30, rows: int = 8, rounds: int = 3) -> dict[str, Any]:
    """Seconds by operator of the package's optimizer step, and of its multiplications alone.

    Returns:
        `operators`: name, kind, calls and seconds, longest first; `seconds` of the profiled step;
        `multiplications`: seconds that those of the body and of the head take by themselves; `gflops` a second there.
    """
    model = real_model(layers).train()
    batch = Case(batch=rows).rows()
    step = optimizer_step("own", method, model, batch)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    operators = [
        {
            "name": event.key,
            "kind": kind_of(event.key),
            "calls": event.count,
            "seconds": event.self_cpu_time_total / 1e6,
        }
        for event in profile.key_averages()
    ]
    tokens = sum(int(part["attention_mask"].sum()) for part in batch)
    return {
        "seconds": seconds,
        "operators": sorted(operators, key=lambda one: -one["seconds"]),
        **multiplications(model, tokens, scored(*batch), rounds),
    }


def kind_of(operator: str) -> str:
    """Key of `KINDS`, or `element by element`."""
    name = operator.rsplit("::", 1)[-1]
    return next((kind for kind, names in KINDS.items() if name in names), "element by element")


@torch.no_grad()
def multiplications(model: Any, tokens: int, scored_tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of a step's matrix products by themselves, forward and backward, and their rate."""
    layers = [module for module in model.base_model.modules() if isinstance(module, nn.Linear)]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    times = {shape: _product_seconds(tokens, shape, rounds) for shape in set(shapes)}
    head = tuple(model.get_output_embeddings().weight.shape)
    body = sum(times[shape] for shape in shapes)
    operations = 6 * (tokens * sum(a * b for a, b in shapes) + scored_tokens * head[0] * head[1])
    in_head = _product_seconds(scored_tokens, head, rounds)
    return {"body_seconds": body, "head_seconds": in_head, "gflops": operations / (body + in_head) / 1e9}


def _product_seconds(tokens: int, shape: tuple[int, ...], rounds: int) -> float:
    outputs, inputs = shape
    states, weight, gradient = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    out = torch.empty(tokens, outputs), torch.empty(tokens, inputs), torch.empty(outputs, inputs)
    works: list[Callable[[], Any]] = [
        lambda: torch.mm(states, weight.t(), out=out[0]),
        lambda: torch.mm(gradient, weight, out=out[1]),
        lambda: torch.mm(gradient.t(), states, out=out[2]),
    ]
    return sum(median([_seconds(work) for _ in range(rounds + 1)][1:]) for work in works)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
