"""Metrics: pure functions, and torchmetrics wrappers that are exact on any number of processes."""
