"""Forget objectives, one class each; a config names one by its class, so a new one needs no other change."""

from simnpo_pl.objectives.base import ForgetInputs, Models, Objective, Positions
from simnpo_pl.objectives.constrained import PDU
from simnpo_pl.objectives.distillation import RKLD, UNDIAL
from simnpo_pl.objectives.likelihood import IDK, FineTune, GradAscent, GradDiff
from simnpo_pl.objectives.preference import DPO, NPO, LengthNormalizedNPO, ReferenceFreeNPO, SimNPO
from simnpo_pl.objectives.raw_logits import NPORawLogits, SimNPORawLogits
from simnpo_pl.objectives.representation import RMU
from simnpo_pl.objectives.tokens import CEU, WGA, SatImp

__all__ = [
    "CEU",
    "DPO",
    "IDK",
    "NPO",
    "PDU",
    "RKLD",
    "RMU",
    "UNDIAL",
    "WGA",
    "FineTune",
    "ForgetInputs",
    "GradAscent",
    "GradDiff",
    "LengthNormalizedNPO",
    "Models",
    "NPORawLogits",
    "Objective",
    "Positions",
    "ReferenceFreeNPO",
    "SatImp",
    "SimNPO",
    "SimNPORawLogits",
]
