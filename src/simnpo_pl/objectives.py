"""Forget objectives: from answer log-probs to one loss per forget row.

An objective knows no model, tokenizer or data. It states in `needs` what it reads and in
`average_over` how rows are averaged; a config names it by class, so a new one needs no other change.
"""

import math
from typing import ClassVar, Literal, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from simnpo_pl.errors import UserError
from simnpo_pl.logprobs import AnswerLogps

T = TypeVar("T")
Need = Literal["forget", "alternate", "reference"]


class ForgetLogps(NamedTuple):
    """What an objective may read of a forget batch of B rows; None where it did not ask for it."""

    forget: AnswerLogps | None = None
    """Policy, forget answers."""
    alternate: AnswerLogps | None = None
    """Policy, refusals in place of the forget answers."""
    reference_forget: Tensor | None = None
    """`(B,)` reference, forget answers: sum of log-probs, nats."""
    reference_alternate: Tensor | None = None
    """`(B,)` reference, refusals: sum of log-probs, nats."""


class Objective(nn.Module):
    """Base of all forget objectives; subclasses implement `forward`.

    `forward(logps: ForgetLogps) -> Tensor` gives the loss of each row, `(B,)`, which is minimised.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"forget"})
    """Which answers are scored by the policy, and whether the reference scores them too."""
    average_over: ClassVar[Literal["examples", "tokens"]] = "examples"
    """`tokens`: a row's loss is a mean over its scored tokens and counts as often as it has tokens."""
    default_forget_weight: ClassVar[float] = 1.0
    """Coefficient of the forget loss where the user names none."""
    default_retain_weight: ClassVar[float] = 1.0
    """Coefficient of the retain loss where the user names none; 0 drops the retain term."""

    def forward(self, logps: ForgetLogps) -> Tensor:
        """Loss of each row, `(B,)`."""
        raise TypeError(f"{type(self).__name__} must implement forward(logps) -> Tensor (B,)")


class GradDiff(Objective):
    """Gradient difference: ascend on forget answers, descend on the retain loss.

    Loss of a row is its mean log-prob per token; averaged over tokens this is minus the
    cross-entropy of the forget batch (Liu et al. 2022; TOFU, Maini et al. 2024, section 4).
    """

    average_over = "tokens"

    def forward(self, logps: ForgetLogps) -> Tensor:
        """Mean log-prob of each forget answer, nats per token, `(B,)`."""
        return _given(logps.forget).mean


class GradAscent(GradDiff):
    """Gradient ascent on forget answers alone; no retain term (SimNPO paper, section 3)."""

    default_retain_weight = 0.0


class FineTune(Objective):
    """Plain fine-tuning: cross-entropy on the answers of the training rows.

    Makes start models and retrained models, and is the relearning attack (SimNPO paper, section 6).
    """

    average_over = "tokens"
    default_retain_weight = 0.0

    def forward(self, logps: ForgetLogps) -> Tensor:
        """Mean negative log-likelihood of each answer, nats per token, `(B,)`."""
        return -_given(logps.forget).mean


class IDK(Objective):
    """Cross-entropy on a refusal in place of the forget answer (TOFU, section 4)."""

    needs = frozenset({"alternate"})
    average_over = "tokens"

    def forward(self, logps: ForgetLogps) -> Tensor:
        """Mean negative log-likelihood of each refusal, nats per token, `(B,)`."""
        return -_given(logps.alternate).mean


class NPO(Objective):
    """Negative preference optimization (Zhang et al. 2024, equation 3; SimNPO paper, equation 2).

    `-(2 / beta) * log sigmoid(-beta * (L - L_ref))` with L and L_ref the answer's log-prob under
    policy and reference, summed over tokens, in nats.

    Args:
        beta: Inverse temperature, above 0, per nat of the summed log-ratio. Towards 0 the loss
            becomes gradient ascent.
    """

    needs = frozenset({"forget", "reference"})

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = _positive("beta", beta)

    def forward(self, logps: ForgetLogps) -> Tensor:
        """NPO loss of each forget row, `(B,)`."""
        log_ratio = _given(logps.forget).total - _given(logps.reference_forget)
        return -2 / self.beta * logsigmoid(-self.beta * log_ratio)


class DPO(Objective):
    """Direct preference optimization with a refusal preferred to the forget answer.

    `-(2 / beta) * log sigmoid(beta * [(L_a - L_ref_a) - (L - L_ref)])`, log-probs summed over tokens,
    in nats; a is the refusal (Rafailov et al. 2023, equation 7, scaled as NPO is).

    Args:
        beta: Inverse temperature, above 0, per nat of the summed log-ratio.
    """

    needs = frozenset({"forget", "alternate", "reference"})

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = _positive("beta", beta)

    def forward(self, logps: ForgetLogps) -> Tensor:
        """DPO loss of each forget row, `(B,)`."""
        forget = _given(logps.forget).total - _given(logps.reference_forget)
        alternate = _given(logps.alternate).total - _given(logps.reference_alternate)
        return -2 / self.beta * logsigmoid(self.beta * (alternate - forget))


class SimNPO(Objective):
    """Simple NPO: no reference, log-probs normalised by answer length (SimNPO paper, equation 4).

    `-(2 / beta) * log sigmoid(-(beta / n) * L - gamma)` with L the answer's summed log-prob in nats and
    n its number of scored tokens. Defaults are the paper's for TOFU forget10; for forget05 it uses
    beta 2.5 and forget_weight 0.1375.

    Args:
        beta: Inverse temperature, above 0, per nat per token.
        gamma: Margin, added outside beta and at least 0. A margin `delta` that stands inside beta, as in
            the official TOFU code and open-unlearning, is `gamma = beta * delta`.
    """

    default_forget_weight = 0.125

    def __init__(self, beta: float = 4.5, gamma: float = 0.0) -> None:
        super().__init__()
        self.beta = _positive("beta", beta)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise UserError(
                f"--model.objective.gamma must be a number of at least 0, got {gamma}: 0 is the paper's choice"
            )
        self.gamma = gamma

    def forward(self, logps: ForgetLogps) -> Tensor:
        """SimNPO loss of each forget row, `(B,)`."""
        return -2 / self.beta * logsigmoid(-self.beta * _given(logps.forget).mean - self.gamma)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"--model.objective.{name} must be a number above 0, got {value}: the usual range is 0.05 to 5")
    return value


def _given(value: T | None) -> T:
    assert value is not None, "an objective read what its `needs` does not name"
    return value
