"""Everything that runs on a GPU runs on a second device that is not the CPU: no test here needs a GPU."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from device_checks import NAMES, DeviceChecks, Step


def in_child(function: Callable[..., Any], *args: Any) -> tuple[int, str]:
    """Call a function on the second device, which changes torch: in a forked process, which has imported everything.

    Returns:
        Exit code, and what was printed.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            code: Any = 70
            try:
                sys.stdout = sys.stderr = output
                import second_device  # noqa: F401

                function(*args)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                output.flush()
                os._exit(code or 0)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def command(arguments: list[str]) -> None:
    """A command of the command line; its question for a GPU is answered as a GPU that computes in bfloat16 does."""
    from simnpo_pl.__main__ import main

    def asked_for_precision(*args: Any, **kwargs: Any) -> bool:
        return sys._getframe(1).f_code.co_name == "precision"

    torch.cuda.is_available = torch.cuda.is_bf16_supported = asked_for_precision
    os.environ.pop("SIMNPO_PL_RUN_DIR", None)
    main(arguments)


class TestSecondDevice(DeviceChecks):
    shape = {"num_hidden_layers": 2}
    device_type = "second"
    run = staticmethod(lambda arguments: in_child(command, arguments))


@pytest.fixture(scope="module")
def step(make_model: Callable[..., Path]) -> Step:
    return Step([make_model(seed) for seed in range(3)])


@pytest.mark.parametrize("objective", NAMES)
def test_losses_agree_with_the_cpu(step: Step, objective: str):
    def check() -> None:
        import second_device

        step.compare(second_device.DEVICE, objective)

    code, text = in_child(check)
    assert code == 0, text
