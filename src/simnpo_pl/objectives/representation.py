"""Objectives on hidden states."""

from typing import Literal

import torch
from torch import Tensor

from simnpo_pl.objectives.base import ForgetInputs, Objective
from simnpo_pl.utils.errors import one_of, positive


class RMU(Objective):
    """Representation misdirection (Li et al. 2024, "The WMDP Benchmark", section 4).

    `mean over dimensions of (h - c * u)^2` at every token of an answer, averaged over tokens; h is the policy's hidden
    state after one layer, u a fixed random direction: a unit vector of entries drawn uniformly from 0 to 1. Used with
    the retain loss `EmbedDiff` at the same layer. Trained are the down-projections of this layer's MLP and of the two
    below it, unless `--model.trainable` says otherwise; layers above it get no gradient, so naming them too needs
    `--trainer.strategy ddp_find_unused_parameters_true` on several devices.

    Args:
        layer: Number of the layer, from 0.
        coefficient: c, length of the target vector, above 0; 2 to 20 in public code.
        seed: Seed of u, independent of all other random numbers.
        average_over: `answers` averages over the answers' tokens. `crossed` multiplies each row's sum by the mean of
            1/length over the rows of the forward pass, as public code does; it exists for comparison.
    """

    needs = frozenset({"states"})
    layer: int

    def __init__(
        self,
        layer: int = 7,
        coefficient: float = 20.0,
        seed: int = 0,
        average_over: Literal["answers", "crossed"] = "answers",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.coefficient = positive("--model.objective.coefficient", coefficient)
        self.seed = seed
        self.average_over = one_of("--model.objective.average_over", average_over, ("answers", "crossed"))
        self.mean_over = "tokens" if average_over == "answers" else "examples"
        layers = "|".join(map(str, range(max(0, layer - 2), layer + 1)))
        # The names of down-projections in transformers.
        names = "down_proj|c_proj|fc2|fc_out|dense_4h_to_h"
        self.default_trainable = (rf".*\.(?:{layers})\.(?:mlp\.)?(?:{names})\.weight",)

    def direction(self, dimensions: int) -> Tensor:
        """u, `(D,)`."""
        entries = torch.rand(dimensions, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32)
        return entries / entries.norm()

    def forward(self, inputs: ForgetInputs) -> Tensor:
        states = inputs.states.layers[self.layer]
        target = self.coefficient * self.direction(states.hidden.shape[1]).to(states.hidden.device)
        return states.row_means((states.hidden - target).square().mean(dim=-1), self.average_over == "crossed")
