"""Interleaved times, peak memory in a separate process, and what the machine is."""

import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass
class Times:
    """Seconds of one variant, round by round."""

    wall: list[float]
    cpu: list[float]
    system: list[float] = field(default_factory=list)


def interleave(
    variants: Mapping[str, Work], rounds: int, longest: float = float("inf"), warm: bool = True
) -> dict[str, Times]:
    """Times of several variants, each run once in every round, so that whatever slows the machine slows all.

    A first round is not counted, if `warm`: it is the one that fetches memory and warms caches. Where it takes longer
    than `longest` seconds it is the only one, and counted.
    """
    start = time.perf_counter()
    taken = [_round(variants)]
    if time.perf_counter() - start <= longest:
        taken = taken[warm:] + [_round(variants) for _ in range(rounds - (not warm))]
    return {name: Times([one[name][0] for one in taken], [one[name][1] for one in taken]) for name in variants}


def _round(variants: Mapping[str, Work]) -> dict[str, tuple[float, float]]:
    found = {}
    for name, work in variants.items():
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        found[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    return found


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


MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}
"""Large blocks go back to the system as soon as they are freed, so that a process's size is what it holds."""


def each_in_a_process(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], at_once: int = 2) -> list[Any]:
    """What a function of this package gives for each tuple of arguments, each in a fresh process of one thread.

    The processes are forked from one that has read the modules and done nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.children"])
    kept = dict(os.environ)
    os.environ.update(MALLOC, OMP_NUM_THREADS="1")
    try:
        with ProcessPoolExecutor(at_once, mp_context=context, max_tasks_per_child=1) as pool:
            return list(pool.map(function, *zip(*calls, strict=True)))
    finally:
        os.environ.clear()
        os.environ.update(kept)


def thread_environment(threads: int | None = None) -> dict[str, str]:
    """The environment of a process with so many threads; as many as here by default."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads())}


def in_a_process(*arguments: str, threads: int) -> str:
    """Last line that `python -m bench` prints for these arguments."""
    command = [sys.executable, "-m", "bench", *arguments]
    result = subprocess.run(command, env=thread_environment(threads), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return result.stdout.strip().splitlines()[-1]


# -- machine ---------------------------------------------------------------------------------------------


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 numbers; another emulates them, many times slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in names}},
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
