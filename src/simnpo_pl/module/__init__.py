"""The LightningModule that unlearns, and the one that only evaluates."""

from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.module.updates import GRU, SAM, UpdateRule

__all__ = ["GRU", "SAM", "UnlearningModule", "UpdateRule"]
