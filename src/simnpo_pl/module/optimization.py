"""AdamW and its learning-rate schedule, as the paper's recipes have them."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from simnpo_pl.utils.errors import UserError

Shape = Literal["linear", "constant"]


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; norms and biases are not decayed.

    Args:
        model: Its parameters that require a gradient are trained.
        lr: Learning rate at its peak.
        betas: Decay rates of the first and second moment.
        weight_decay: Weight decay of matrices.
        eight_bit: Whether both moments are kept in 8 bits (Dettmers et al. 2022, arXiv 2110.02861).

    Raises:
        UserError: Moments in 8 bits need bitsandbytes, which is not installed.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if eight_bit:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError(
                "--model.optimizer adamw_8bit needs bitsandbytes: pip install 'simnpo_pl[8bit]', or leave adamw"
            ) from error
        return AdamW8bit(groups, lr=lr, betas=betas)
    # Some strategies hand over parameters that the fused kernel does not know.
    fused = all(type(p.data) is Tensor and p.is_floating_point() for p in trained)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
    # The fused kernel claims to unscale gradients itself; Lightning then refuses to clip them in mixed precision.
    # Without the claim the scaler, if there is one, unscales before clipping.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def schedule(shape: Shape, warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the learning rate at each optimizer step: a linear rise, then what `shape` says.

    The first step already moves (factor 1 / warmup) and the last one still does.

    Args:
        shape: `linear` falls to 0 after the rise, `constant` stays at 1.
        warmup: Optimizer steps of the rise.
        total: Optimizer steps of the run.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 1.0 if shape == "constant" else max(0.0, (total - step) / max(1, total - warmup))

    return factor
