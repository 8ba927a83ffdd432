"""AdamW and its learning-rate schedule, as in the paper's recipes."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from simnpo_pl.utils.errors import UserError

Shape = Literal["linear", "constant"]


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, eight_bit: bool = False
) -> torch.optim.Optimizer:
    """AdamW over the parameters that require a gradient; norms and biases are not decayed. A step frees the gradients.

    With `eight_bit` both moments are kept in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), which needs bitsandbytes.
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
        optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=lr, betas=betas)
    else:
        # Some strategies wrap parameters in types that the fused kernel does not know.
        fused = all(type(p.data) is Tensor and p.is_floating_point() for p in trained)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)
        # The fused kernel claims to unscale gradients itself; Lightning then refuses to clip them in mixed precision.
        optimizer._step_supports_amp_scaling = False
    # Lightning would hold them until the next forward pass is over, on top of all its activations.
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    return optimizer


def schedule(shape: Shape, warmup: int, total: int) -> Callable[[int], float]:
    """Factor of the learning rate at optimizer step k: a linear rise, then `linear` decay to 0 or `constant`.

    Ours and not `transformers.get_scheduler`, whose first step does not move: the rise is (k + 1) / warmup here,
    k / warmup in the official recipes.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 1.0 if shape == "constant" else max(0.0, (total - step) / max(1, total - warmup))

    return factor


def not_finite(step: int, losses: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> UserError:
    """Names the rows of the micro-batch whose losses spoil an optimizer step."""
    values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
    chosen = {name: index.tolist() for name, index in rows.items()}
    return UserError(
        f"loss is not finite at optimizer step {step} ({values}), rows {chosen}: "
        "lower --model.lr, check the start model's weights, or look at these rows"
    )
