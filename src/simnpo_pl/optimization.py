"""AdamW and its learning-rate schedule, as the paper's recipe has them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters; norms and biases are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Some strategies hand over parameters that the fused kernel does not know.
    fused = all(type(p.data) is Tensor and p.is_floating_point() for p in trained)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def linear_schedule(warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the learning rate at each optimizer step: a linear rise, then a linear fall to 0.

    The first step already moves (factor 1 / warmup) and the last one still does.

    Args:
        warmup: Optimizer steps of the rise.
        total: Optimizer steps of the run.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (total - step) / max(1, total - warmup))

    return factor
