"""Gradient norms of answers: a backward pass for every row, inside an evaluation that otherwise has none."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.utils.errors import UserError

GRADIENT_NORM = "gradient_norm"


def gradient_norms(model: Any, scorer: Scorer, rows: Mapping[str, Tensor]) -> Tensor:
    """Size of each answer's gradient with respect to the weights.

    Every weight counts, trained or not, and the model is in eval mode, so the number depends on the weights alone. It
    is computed in the weights' own type, without autocast.

    Args:
        model: Causal language model; its gradients, modes and flags are left as they were.
        scorer: Scores rows with that model.
        rows: `input_ids`, `labels` and `attention_mask` `(B, T)`; `end` `(B,)`, the number of tokens that end each
            answer and are left out of the loss.

    Returns:
        `(B,)` mean over the parameter tensors of the L2 norm of the gradient of the row's mean loss, nats per token.

    Raises:
        UserError: The weights are sharded.
    """
    # With an adapter, the gradient of the base's weights is that of the weights it would be merged into.
    parameters = [p for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name]
    if any(hasattr(p, "full_tensor") for p in parameters):
        raise UserError("--eval.gradnorm needs whole weights on each device: run it on one device or by ddp")
    trained, training = [p.requires_grad for p in parameters], model.training
    norms = []
    device = rows["input_ids"].device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        try:
            model.eval()
            for parameter in parameters:
                parameter.requires_grad_(True)
            for row in range(len(rows["input_ids"])):
                width = int(rows["attention_mask"][row].sum())
                # Copies, because tensors made in inference mode cannot take part in a backward pass.
                names = ("input_ids", "labels", "attention_mask")
                states = scorer({"row": {name: rows[name][row : row + 1, :width].clone() for name in names}})["row"]
                kept = max(0, len(states.labels) - int(rows["end"][row]))
                loss = -states.token_logps()[:kept].mean()
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                sizes = [gradient.float().norm() for gradient in found if gradient is not None]
                norms.append(torch.stack(sizes).mean().detach())
        finally:
            model.train(training)
            for parameter, wanted in zip(parameters, trained, strict=True):
                parameter.requires_grad_(wanted)
    return torch.stack(norms)
