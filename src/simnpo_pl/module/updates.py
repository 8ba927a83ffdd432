"""Update rules: how the forget and the retain gradient of an effective batch make one optimizer step.

Without a rule an optimizer step takes the gradient of the weighted sum of both losses.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from simnpo_pl.objectives.base import Batch, batch_losses
from simnpo_pl.utils.errors import UserError, positive


class UpdateRule:
    """Base of all update rules; subclasses implement `combine`.

    The two gradients are added up over micro-batches and processes, and combined once per optimizer step, before they
    are clipped.
    """

    reads_retain: ClassVar[bool] = False
    """Whether it reads the retain gradient whatever the retain weight is, which is then 0 by default."""
    cost: ClassVar[str]
    """Passes of a step and memory, in a few words."""
    copies: ClassVar[int] = 2
    """Tensors of the size of all trained weights that it needs in addition."""

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._retain: list[Tensor] = []
        self._losses: tuple[Tensor, Tensor] | None = None
        self._batches: list[tuple[Batch, int]] = []

    def combine(self, module: Any, forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        """The gradients of the trained weights that the optimizer gets.

        Args:
            module: The `UnlearningModule`.
            forget: Gradients of the weighted forget loss of the effective batch; may be modified.
            retain: Those of the retain loss, weighted unless `reads_retain`; empty if there is no retain loss.
        """
        raise TypeError(f"{type(self).__name__} must implement combine(module, forget, retain)")

    def check(self, trainer: Any, module: Any) -> None:
        """Refuse what the rule cannot work with."""
        option = f"--model.update {type(self).__name__}"
        if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
            raise UserError(f"{option} needs whole gradients on every device: give --trainer.strategy ddp or auto")
        if trainer.precision == "16-mixed":
            raise UserError(f"{option} does not support the scaled losses of 16-mixed: give bf16-mixed or 32-true")
        if module.dtype_name == "bfloat16" and module.lora is None:
            raise UserError(f"{option} needs weights in float32: leave out --model.dtype and give bf16-mixed")
        if module.lr == "auto":
            raise UserError(f"{option}: --model.lr auto takes the gradient of the total loss: give --model.lr a number")

    def start(self, module: Any) -> None:
        """Called before the first step, on the module's device."""
        self.check(module.trainer, module)
        self._weights = [weight for weight in module.policy.parameters() if weight.requires_grad]
        self._retain, self._batches = [], []
        if isinstance(module.trainer.strategy, DDPStrategy):
            # The two gradients are summed separately, see `finish`.
            wrapped: Any = module.trainer.strategy.model
            wrapped.require_backward_grad_sync = False

    def take(self, module: Any, batch: Batch, seed: int, forget: Tensor, retain: Tensor) -> None:
        """Receive the losses of a micro-batch, scalars with their graph, and the seed of its forward pass."""
        self._batches.append((batch, seed))
        weighted = _weighted(module, forget.detach(), retain)
        self._losses = _weighted(module, forget, retain.detach()), retain if self.reads_retain else weighted

    def backward(self) -> None:
        """Add the gradients of the micro-batch that was taken last."""
        assert self._losses is not None
        forget, retain = self._losses
        forget.backward(retain_graph=retain.requires_grad)
        if retain.requires_grad:
            new = torch.autograd.grad(retain, self._weights, materialize_grads=True)
            self._retain = _added(self._retain, new) if self._retain else list(new)
        self._losses = None

    @torch.no_grad()
    def finish(self, module: Any) -> None:
        """Put the combined gradients of the effective batch where the optimizer reads them."""
        forget, retain = self._sum_gradients(module), _sum(module, self._retain)
        for weight, gradient in zip(self._weights, self.combine(module, forget, retain), strict=True):
            weight.grad = gradient
        self._retain, self._batches = [], []

    def _sum_gradients(self, module: Any) -> list[Tensor]:
        """The gradients that backward passes left, summed over processes and taken away."""
        found = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        for weight in self._weights:
            weight.grad = None
        return _sum(module, found)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, before `start`."""


class SAM(UpdateRule):
    """Sharpness-aware minimization of the forget loss (Fan et al. 2025, arXiv 2502.05374).

    The forget gradient is taken at `w + rho * g / |g|`, with g the forget gradient of the whole effective batch at the
    weights w and |g| its norm over all trained weights; the retain gradient is taken at w. Afterwards w is restored to
    the bit; public code subtracts the perturbation, which leaves rounding errors.

    Args:
        rho: Length of the perturbation, above 0.
    """

    cost = (
        "two forward passes of the forget rows and one of the retain rows, three backward passes; "
        "two more copies of the trained weights"
    )

    def __init__(self, rho: float = 0.01) -> None:
        super().__init__()
        self.rho = positive("--model.update.rho", rho)

    def combine(self, module: Any, forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        norm = torch.stack([gradient.norm() for gradient in forget]).norm()
        kept = [weight.clone() for weight in self._weights]
        for weight, gradient in zip(self._weights, forget, strict=True):
            # A gradient of zero has no direction.
            weight.add_(gradient * (self.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)))
        forget.clear()
        for batch, seed in self._batches:
            torch.manual_seed(seed)
            with torch.enable_grad():
                with module.trainer.precision_plugin.forward_context():
                    again = batch_losses(module.objective, None, batch, module._models(batch)).forget
                    loss = _weighted(module, again, again.new_zeros(()))
                loss.backward()
        for weight, old in zip(self._weights, kept, strict=True):
            weight.copy_(old)
        perturbed = self._sum_gradients(module)
        return _added(perturbed, retain) if retain else perturbed


class GRU(UpdateRule):
    """Gradient rectified unlearning (Wang et al. 2025, arXiv 2503.09117).

    With g the forget gradient and r the retain gradient of the effective batch, `e = newest * r + (1 - newest) * e` is
    a moving average that starts at 0. If `<g, e> < 0`, the step takes `g - <g, e> / <e, e> * e`, else g. A retain
    weight above its default of 0 adds r times the weight, which public code does not. The code proposed to
    open-unlearning rectifies every micro-batch; here it is the effective batch.

    Args:
        newest: Weight of the newest retain gradient in the moving average, above 0 and at most 1; 1 takes no average.
    """

    reads_retain = True
    cost = "one forward pass, two backward passes; two more copies of the trained weights"

    def __init__(self, newest: float = 0.8) -> None:
        super().__init__()
        if not 0 < newest <= 1:
            raise UserError(f"--model.update.newest must be above 0 and at most 1, got {newest}")
        self.newest = newest
        self._average: list[Tensor] = []

    def combine(self, module: Any, forget: list[Tensor], retain: list[Tensor]) -> list[Tensor]:
        old = self._average or [torch.zeros_like(gradient) for gradient in retain]
        self._average = [one.to(new.device).lerp_(new, self.newest) for one, new in zip(old, retain, strict=True)]
        conflict, square = _dot(forget, self._average), _dot(self._average, self._average)
        share = torch.where(square > 0, conflict / square, 0.0).clamp(max=0)
        rectified = [one.sub_(share * other) for one, other in zip(forget, self._average, strict=True)]
        return _added(rectified, [gradient.mul_(module.retain_weight) for gradient in retain])

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = state["average"]


def _weighted(module: Any, forget: Tensor, retain: Tensor) -> Tensor:
    return module.objective.total(forget, retain, module.forget_weight, module.retain_weight)


def _sum(module: Any, gradients: list[Tensor]) -> list[Tensor]:
    """Sums over all processes."""
    return [module.trainer.strategy.reduce(gradient, reduce_op="sum") for gradient in gradients]


def _added(one: list[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(one, other, strict=True)]


def _dot(one: list[Tensor], other: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
