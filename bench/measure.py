"""Interleaved times, peak memory in a process of its own, and what the machine is."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass
class Times:
    """Seconds of one variant, round by round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleave(variants: Mapping[str, Work], rounds: int, say: Callable[[str], None] | None = None) -> dict[str, Times]:
    """Times of several variants, each run once in every round, so that whatever slows the machine slows all.

    A first round is not counted: it is the one that fetches memory and warms caches.
    """
    times = {name: Times() for name in variants}
    for number in range(rounds + 1):
        for name, work in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if number:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
        if say is not None:
            say(f"round {number} of {rounds}" if number else "warm-up")
    return times


def median(values: list[float]) -> float:
    """Median; 0 for none."""
    return statistics.median(values) if values else 0.0


def ratio(one: Times, other: Times) -> dict[str, float]:
    """Median over the rounds of the ratio of two variants, by wall and by processor time."""
    return {
        clock: median([a / b for a, b in zip(getattr(one, clock), getattr(other, clock), strict=True)])
        for clock in ("wall", "cpu")
    }


# -- memory ----------------------------------------------------------------------------------------------


def peak(work: Work) -> float | None:
    """How far the process's memory rises above its present size while it works, MiB; None where Linux does not say."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    before = _status("VmRSS")
    # Resets the high-water mark.
    clear.write_text("5")
    work()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{key}:"))
    return int(line.split()[1])


def in_a_process(*arguments: str, threads: int | None = None) -> str:
    """Last line that `python -m bench` prints for these arguments.

    Large blocks go back to the system as soon as they are freed, so that the process's size is what it holds.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env["THP_MEM_ALLOC_ENABLE"] = "0"
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "bench", *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return result.stdout.strip().splitlines()[-1]


# -- machine ---------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, threads, versions and how busy the machine is."""
    cpu = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    names = ("simnpo_pl", "torch", "transformers", "lightning")
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
