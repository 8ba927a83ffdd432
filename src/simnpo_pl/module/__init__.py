"""The LightningModule that unlearns, and the one that only evaluates."""

from simnpo_pl.module.unlearning import UnlearningModule

__all__ = ["UnlearningModule"]
