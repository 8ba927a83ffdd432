"""A self-contained demo: fictional authors and small models that have learnt them.

Both are made on the spot from a seed, so the demo needs no download.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

VERSION = 2
"""Raise whenever a change here alters the generated data or models; older folders are then rebuilt."""

EPOCHS = 14
"""Passes over the training rows with which a model knows nearly every answer."""

MODELS = ("start", "retrained")
"""Folders of the models."""


def prepare(folder: Path, seed: int = 0, epochs: int = EPOCHS, progress: bool = True) -> None:
    """Makes the data set and both models in a folder, unless they are there already.

    Args:
        folder: Where the data files and the folders `start` and `retrained` go.
        seed: Chooses the data, the initial weights and the order of training.
        epochs: Passes of each model over its training rows.
        progress: Shows a progress bar while training.
    """
    marker = folder / "fingerprint.json"
    fingerprint = {"version": VERSION, "seed": seed, "epochs": epochs}
    if _read(marker) == fingerprint and all((folder / name / "model.safetensors").is_file() for name in MODELS):
        return
    # An interrupted rebuild must not look complete.
    marker.unlink(missing_ok=True)

    from simnpo_pl.benchmarks.demo.authors import write_dataset
    from simnpo_pl.benchmarks.demo.models import build_models

    write_dataset(folder, seed)
    build_models(folder, seed, progress=progress, epochs=epochs)
    temporary = marker.with_suffix(".tmp")
    temporary.write_text(json.dumps(fingerprint), encoding="utf-8")
    os.replace(temporary, marker)


def _read(marker: Path) -> object:
    """What a fingerprint file holds; None when it is missing or damaged."""
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
