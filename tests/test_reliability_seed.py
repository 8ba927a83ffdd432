"""The seed decides everything that is drawn, and nothing else does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers import results, same_weights
from simnpo_pl.data.pairing import draw_step_seed

TIMES = ("seconds", "cpu_seconds", "peak_memory_gib", "command")


def test_same_seed_same_results(
    cli: Callable[..., None], make_model: Callable[..., Path], tmp_path: Path, monkeypatch: Any
):
    """Refusals, pairing, dropout of model and adapter: `results.json` is the same but for times.

    Another seed draws other refusals, partners and dropout.
    """
    options = ["--model.name", str(make_model(0, attention_dropout=0.3)), "--model.objective", "DPO"]
    options += ["--model.lora.rank", "4", "--model.lora.dropout", "0.3", "--trainer.max_epochs", "1"]
    options += ["--eval.cache_dir", "null", "--eval.generate_rows", "2"]
    found, drawn = {}, {}
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        torch.rand(hash(name) % 7)
        folder = tmp_path / name
        seen: list[Any] = []
        from simnpo_pl.module.unlearning import UnlearningModule

        step = UnlearningModule.training_step

        def watch(self: Any, batch: Any, batch_idx: int, seen: list[Any] = seen, step: Any = step) -> Any:
            seen.append({name: (part["index"].tolist(), part["input_ids"].tolist()) for name, part in batch.items()})
            loss = step(self, batch, batch_idx)
            seen.append(torch.rand(1).item())
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(UnlearningModule, "training_step", watch)
            cli("fit", *options, "--seed_everything", str(seed), "--run_dir", str(folder))
        found[name] = {key: value for key, value in results(folder).items() if key not in TIMES}
        drawn[name] = seen
    assert found["one"] == found["two"]
    assert drawn["one"] == drawn["two"]
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert found["three"]["seed"] == 4
    assert found["three"]["final"] != found["one"]["final"]
    one, three = drawn["one"][0], drawn["three"][0]
    assert {part for part in one if one[part] != three[part]} == {"forget", "retain", "alternate"}
    first_three = {row: ids for batch in drawn["three"][::2] for row, ids in zip(*batch["alternate"], strict=True)}
    first_one = {row: ids for batch in drawn["one"][::2] for row, ids in zip(*batch["alternate"], strict=True)}
    assert {row for row in first_one if first_one[row] != first_three[row]}


def test_no_two_passes_draw_alike():
    """Neither epochs, nor micro-batches, nor processes, nor seeds share what they draw."""
    seeds = {draw_step_seed(s, e, b, r) for s in range(3) for e in range(5) for b in range(20) for r in range(4)}
    assert len(seeds) == 3 * 5 * 20 * 4
    assert draw_step_seed(1, 2, 3, 4) == draw_step_seed(1, 2, 3, 4)
