"""Everything that runs on a GPU runs on a second device that is not the CPU: no test here needs a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from device_checks import NAMES, DeviceChecks, Step
from helpers import command_on_gpu, on_second_device


class TestSecondDevice(DeviceChecks):
    shape = {"num_hidden_layers": 2}
    device_type = "second"
    run = staticmethod(lambda arguments: on_second_device(command_on_gpu, arguments))


@pytest.fixture(scope="module")
def differences(make_model: Callable[..., Path]) -> dict[str, str]:
    """Objective to what differs from the CPU, found in one process."""
    step = Step([make_model(seed, num_hidden_layers=1) for seed in range(3)])

    def compare() -> None:
        import second_device

        print(json.dumps({name: step.differences(second_device.DEVICE, name) for name in NAMES}))

    code, text = on_second_device(compare)
    assert code == 0, text
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("objective", NAMES)
def test_losses_agree_with_the_cpu(differences: dict[str, str], objective: str):
    assert not differences[objective]
