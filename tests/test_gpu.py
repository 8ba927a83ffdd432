"""A real GPU: README's commands on a model of 1.2 billion random weights, and the losses of a step. `make test-gpu`.

The same checks run on the second device with a tiny model, in test_second_device.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from device_checks import NAMES, ROOT, DeviceChecks, Step
from helpers import history, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that CUDA sees")]

DEVICE = "cuda"
ACCELERATOR = "gpu"
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
"""Of Llama-3.2-1B."""
STEP = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "initializer_range": 0.05}
"""Of the models whose losses are compared with the CPU's."""


def in_process(arguments: list[str]) -> tuple[int, str]:
    """The command line in a process of its own."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "simnpo_pl", *arguments]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


class TestGPU(DeviceChecks):
    shape: ClassVar[dict[str, Any]] = LLAMA_1B
    device_type = DEVICE
    run = staticmethod(in_process)

    @pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
    def test_strategies_of_one_process(self, fitted: tuple[Path, str], common: list[str], tmp_path: Path, overlay: str):
        """The same losses, and an exported model that can be evaluated."""
        folder = tmp_path / "run"
        words = [*common, "--config", ROOT / f"configs/hardware/{overlay}.yaml", "--trainer.accelerator", ACCELERATOR]
        words += ["--trainer.devices", "1"]
        self.call("fit", *words, "--eval.start", "false", "--run_dir", folder)
        found, expected = ([step["loss"] for step in history(f)] for f in (folder, fitted[0]))
        assert found == pytest.approx(expected, rel=2e-2)
        self.call("test", *common, "--model.name", folder / "model", "--run_dir", tmp_path / "test")
        one, other = (results(f)["final"]["metrics"] for f in (folder, tmp_path / "test"))
        assert one == pytest.approx(other, rel=2e-2, abs=1e-3, nan_ok=True)


@pytest.fixture(scope="module")
def step(make_model: Callable[..., Path]) -> Step:
    return Step([make_model(seed, **STEP) for seed in range(3)])


@pytest.mark.parametrize("objective", NAMES)
def test_losses_agree_with_the_cpu(step: Step, objective: str):
    assert not step.differences(torch.device(DEVICE), objective)


def test_losses_with_tf32(step: Step):
    """Products of 10 bits: rows are packed all the same, and losses stay as near as with bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        # The scorers made so far tried the model without it.
        step.scorers = {device: scorers for device, scorers in step.scorers.items() if device.type == "cpu"}
        assert not step.differences(torch.device(DEVICE), "SimNPO", {"float32": (3e-2, 5e-2)})
    finally:
        torch.set_float32_matmul_precision(before)
