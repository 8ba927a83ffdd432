"""A custom objective: gradient ascent that stops on an answer whose log-prob is low enough.

PYTHONPATH=examples python -m simnpo_pl fit --config configs/demo.yaml --model.objective hinge.HingeAscent
"""

import torch
from torch import Tensor

from simnpo_pl.objectives.base import ForgetInputs, Objective


class HingeAscent(Objective):
    """Loss max(0, L/n - floor) of an answer with summed log-prob L over n tokens.

    Args:
        floor: Mean log-prob, nats per token, below which an answer gets no gradient; at most 0.
    """

    def __init__(self, floor: float = -3.0) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, inputs: ForgetInputs) -> Tensor:
        return torch.relu(inputs.forget.mean - self.floor)
