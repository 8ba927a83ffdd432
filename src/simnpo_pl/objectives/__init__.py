"""Forget objectives, one class each; a config names one by its class, so a new one needs no other change."""

from simnpo_pl.objectives.base import ForgetInputs, Models, Objective, Positions
from simnpo_pl.objectives.constrained import PDU
from simnpo_pl.objectives.likelihood import IDK, FineTune, GradAscent, GradDiff
from simnpo_pl.objectives.preference import DPO, NPO, AltPO, LengthNormalizedNPO, ReferenceFreeNPO, SimNPO
from simnpo_pl.objectives.raw_logits import NPORawLogits, SimNPORawLogits
from simnpo_pl.objectives.representation import RMU
from simnpo_pl.objectives.tokens import CEU, IHL, RKLD, UNDIAL, WGA, JensUn, SatImp

__all__ = [
    "CEU",
    "DPO",
    "IDK",
    "IHL",
    "NPO",
    "PDU",
    "RKLD",
    "RMU",
    "UNDIAL",
    "WGA",
    "AltPO",
    "FineTune",
    "ForgetInputs",
    "GradAscent",
    "GradDiff",
    "JensUn",
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
