"""What tests of whole runs read off a run's folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


def results(folder: Path) -> dict[str, Any]:
    """Content of results.json."""
    return json.loads((folder / "results.json").read_text())


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs exported the same model, bit for bit."""
    a, b = (AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(folder: Path) -> list[float]:
    """Logged loss of every optimizer step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


@contextmanager
def killed_in_epoch(epoch: int) -> Iterator[None]:
    """Ends the run inside, as by a kill, at the first batch of an epoch, from 1."""
    from simnpo_pl.callbacks.run_folder import RunFolder

    class Killed(BaseException):
        pass

    def kill(self: Any, trainer: Any, *args: Any) -> None:
        if trainer.current_epoch == epoch - 1:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "on_train_batch_start", kill, raising=False)
        with pytest.raises(Killed):
            yield


def same_run(one: Path, other: Path) -> bool:
    """Whether two runs ended alike, bit for bit: results but for times, rows, logs of steps and weights."""
    names = ("start", "retrained", "epochs", "final", "counts", "unavailable", "exported_epoch", "finished")
    a, b = (results(folder) for folder in (one, other))
    for name in names:
        assert a.get(name) == b.get(name), name
    for name in ("rows.jsonl", "TOFU_EVAL.json", "history.jsonl", "weights.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    files = sorted(f.name for f in (one / "model").iterdir())
    assert files == sorted(f.name for f in (other / "model").iterdir())
    return all((one / "model" / f).read_bytes() == (other / "model" / f).read_bytes() for f in files)
