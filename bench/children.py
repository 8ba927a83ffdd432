"""What runs in a separate process: peak memory, shares of a distributed step or evaluation."""

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench import job, profile, sides
from bench.cases import Case
from bench.data import Rows, model_of
from bench.evaluation import Losses
from bench.measure import each_in_a_process, in_a_process, median, peak
from bench.step import Step, Variant


def step_peaks(wanted: Sequence[tuple[Case, Variant]]) -> list[float | None]:
    """Working memory of steps above weights, reference and gradients, MiB."""
    return each_in_a_process(_step_peak, wanted)


def scoring_peaks(rows: Sequence[int]) -> list[float | None]:
    """Working memory of scoring so many questions above the model, MiB."""
    return each_in_a_process(_scoring_peak, [(number,) for number in rows])


def distributed(kind: str, processes: int, **settings: Any) -> float:
    """Seconds of a step or an evaluation divided among processes, each with its part of the cores."""
    from concurrent.futures import ThreadPoolExecutor

    threads = max(1, (os.cpu_count() or 1) // processes)
    port = 29500 + os.getpid() % 1000

    def run(rank: int) -> float:
        arguments = json.dumps({**settings, "rank": rank, "processes": processes, "port": port})
        return json.loads(in_a_process("child", kind, arguments, threads=threads))

    with ThreadPoolExecutor(processes) as pool:
        return max(pool.map(run, range(processes)))


# -- in the other process --------------------------------------------------------------------------------


def _step_peak(case: Case, variant: Variant) -> float | None:
    step = case.step(variant)
    # Libraries take their buffers in a first step, on few tokens.
    rows = step.rows
    step.rows = {name: _short(part) for name, part in rows.items()}
    step()
    step.rows = rows
    found = peak(step)
    gradients = sum(p.numel() * p.element_size() for p in step.model.parameters() if p.requires_grad) / 2**20
    return None if found is None else found - gradients


def _short(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first tokens of the first row, all scored."""
    short = {key: value[:1, :6] if value.ndim == 2 else value[:1] for key, value in part.items()}
    return {**short, "labels": short["input_ids"]}


def _scoring_peak(rows: int) -> float | None:
    losses = Losses(small_model(), Rows(VOCABULARY).questions(8))
    losses()
    losses.splits[0].answers = Rows(VOCABULARY).questions(rows)
    return peak(losses)


def _step_time(rank: int, processes: int, port: int, rounds: int, method: str) -> float:
    case = Case()
    step = case.step(Variant(method, "packed"))
    share = slice(rank * case.batch // processes, (rank + 1) * case.batch // processes)
    step.rows = {name: {key: value[share] for key, value in part.items()} for name, part in step.rows.items()}
    work: Callable[[], Any] = step
    if processes > 1:
        _join(rank, processes, port)
        model = nn.parallel.DistributedDataParallel(_Loss(step))

        def work() -> None:
            model().backward()
            step.model.zero_grad(set_to_none=True)

    return _seconds(work, rounds)


def _scoring_time(rank: int, processes: int, port: int, rounds: int, questions: int) -> float:
    from simnpo_pl.evaluation.plan import scoring_batches, share_of
    from simnpo_pl.evaluation.scoring import score_rows

    losses = Losses(small_model(), Rows(VOCABULARY).questions(questions))
    batches = share_of(scoring_batches(losses.splits, 2048), rank, processes)
    if processes > 1:
        _join(rank, processes, port)

    @torch.no_grad()
    def work() -> None:
        for number in range(len(batches)):
            score_rows(losses.scorer({"rows": batches[number]})["rows"], batches[number]["end"])
        if processes > 1:
            dist.barrier()

    return _seconds(work, rounds)


class _Loss(nn.Module):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self.model, self.step = step.model, [step]

    def forward(self) -> Tensor:
        return self.step[0].loss()


def _join(rank: int, processes: int, port: int) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)


def _seconds(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times[1:])


VOCABULARY = 8192


def small_model() -> Any:
    """For evaluations of many rows."""
    return model_of(VOCABULARY, 256, 4)


CHILDREN: dict[str, Callable[..., Any]] = {
    "step_time": _step_time,
    "scoring_time": _scoring_time,
    "serve": sides.serve,
    "job": job.public_job,
    "profile": profile.step_profile,
}
