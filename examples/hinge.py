"""An objective of one's own: gradient ascent that lets go of an answer once it is improbable enough.

PYTHONPATH=examples python -m simnpo_pl fit --config configs/demo.yaml --model.objective hinge.HingeAscent
"""

import torch
from torch import Tensor

from simnpo_pl.objectives.base import ForgetInputs, Objective, given


class HingeAscent(Objective):
    """Loss max(0, L/n - floor) of an answer with summed log-prob L over n tokens.

    Args:
        floor: Nats per token below which an answer is left alone, at most 0.
    """

    def __init__(self, floor: float = -3.0) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, inputs: ForgetInputs) -> Tensor:
        """Loss of each forget row, `(B,)`."""
        return torch.relu(given(inputs.forget).mean - self.floor)
