"""Objectives on the likelihood of whole answers: ascent, descent, refusals."""

from torch import Tensor

from simnpo_pl.objectives.base import ForgetInputs, Objective


class GradDiff(Objective):
    """Gradient difference: ascend on forget answers, descend on the retain loss.

    Loss of a row is its mean log-prob, nats per token; averaged over tokens this is minus the
    cross-entropy of the forget batch (Liu et al. 2022; TOFU, Maini et al. 2024, section 4).
    """

    mean_over = "tokens"

    def forward(self, inputs: ForgetInputs) -> Tensor:
        return inputs.forget.mean


class GradAscent(GradDiff):
    """Gradient ascent on forget answers; no retain term (SimNPO paper, section 3)."""

    default_retain_weight = 0.0


class FineTune(Objective):
    """Plain fine-tuning: cross-entropy on the answers of the training rows, nats per token.

    Makes start models and retrained models, and is the relearning attack (SimNPO paper, section 6).
    """

    mean_over = "tokens"
    default_retain_weight = 0.0

    def forward(self, inputs: ForgetInputs) -> Tensor:
        return -inputs.forget.mean


class IDK(Objective):
    """Cross-entropy on a refusal instead of the forget answer, nats per token (TOFU, section 4)."""

    needs = frozenset({"alternate"})
    mean_over = "tokens"

    def forward(self, inputs: ForgetInputs) -> Tensor:
        return -inputs.alternate.mean
