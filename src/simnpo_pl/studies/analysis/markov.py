"""The study of Markov chains: every method from the same start models, over the same batches, for several seeds."""

import logging
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simnpo_pl.benchmarks.markov.models import SizeName
from simnpo_pl.benchmarks.markov.process import CHAINS, LENGTH, bayes_floors

METHODS: dict[str, tuple[str, dict[str, float]]] = {
    "GA": ("GradAscent", {}),
    "NPO, beta 0.2": ("NPO", {"beta": 0.2}),
    "NPO, beta 1": ("NPO", {"beta": 1.0}),
    "SimNPO, beta 4": ("SimNPO", {"beta": 4.0}),
    "NPO per token, beta 4": ("LengthNormalisedNPO", {"beta": 4.0}),
    "NPO without reference, beta 0.2": ("ReferenceFreeNPO", {"beta": 0.2}),
}
"""Name to objective and its settings; the last two are halves of the step from NPO to SimNPO."""
LENGTHS = (5, LENGTH)
"""Of forget2; where it is short, the start model has seen it."""
SHARES = np.array([2.0, 1.0, 1.0])
LEVELS = (0.05, 0.10)
"""Retain distances at which methods are compared, nats."""
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """What the runs of a study have in common.

    Args:
        size: Key of `markov.models.SIZES`.
        lr: Learning rate of unlearning, constant.
        steps: Optimizer steps at most.
        every: Steps between evaluations.
        batch: Forget sequences a step.
        stop: Retain distance that ends a run, nats: nothing is left to compare beyond it.
    """

    size: SizeName = "small"
    lr: float = 2e-3
    steps: int = 60
    every: int = 2
    batch: int = 4
    stop: float = 0.5


SETTINGS = {"small": Setting(), "paper": Setting("paper", lr=5e-4, steps=50, every=1)}


def study(folder: Path, setting: Setting, seeds: list[int], processes: int, done: Callable[[str], None]) -> list[Any]:
    """Curves of every method.

    Args:
        folder: Where the models go.
        setting: Of the runs.
        seeds: Of data, models and batches.
        processes: That share the work.
        done: Told what has been finished.

    Returns:
        For each length and seed: `length`, `seed`, distances of `start` and `retrained`, and `methods`, name to curve.
    """
    tasks = [(folder, setting, length, seed) for seed in seeds for length in LENGTHS]
    found = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for result in pool.map(_one, *zip(*tasks, strict=True)):
            found.append(result)
            done(f"forget2 of length {result['length']}, seed {result['seed']}: {len(result['methods'])} methods")
    return found


def floors(length: int) -> dict[str, float]:
    """Smallest distances that a start model of this setting can reach, nats."""
    known = SHARES if length < LENGTH else SHARES * (1, 1, 0)
    return bayes_floors(known, length, count=20000)


def _one(folder: Path, setting: Setting, length: int, seed: int) -> dict[str, Any]:
    from simnpo_pl.benchmarks import MarkovData
    from simnpo_pl.evaluation.options import EvalOptions
    from simnpo_pl.studies.analysis.markov_run import measure_once, unlearn

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    path = folder / f"length{length}-seed{seed}"

    def data() -> MarkovData:
        return MarkovData(
            str(path),
            forget2_length=length,
            size=setting.size,
            effective_batch=setting.batch,
            per_device_batch=setting.batch,
            seed=seed,
            eval=EvalOptions(tokens_per_batch=16384),
        )

    data().prepare_data()
    methods = {name: unlearn(str(path / "start"), data(), setting, *method) for name, method in METHODS.items()}
    models = {model: measure_once(str(path / model), data()) for model in ("start", "retrained")}
    return {"length": length, "seed": seed, **models, "methods": methods}


def at_level(curve: Curve, level: float) -> dict[str, float] | None:
    """Forget distances where the retain distance first reaches a level, between two evaluations; None if it never does.

    Args:
        curve: Of a run.
        level: Retain distance, nats.
    """
    for before, after in pairwise(curve):
        low, high = before["retain"], after["retain"]
        if low <= level < high:
            share = (level - low) / (high - low)
            return {name: before[name] + share * (after[name] - before[name]) for name in CHAINS[1:]}
    return None
