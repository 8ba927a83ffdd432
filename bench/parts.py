"""The parts of a benchmark, each a function from the options to what it found."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, astuple
from typing import Any

import numpy as np
import torch

from bench import children, job, overhead
from bench.cases import Case
from bench.data import Batch, Rows, scored
from bench.evaluation import Losses
from bench.gpu import gpu
from bench.measure import Times, has_bf16, in_a_process, interleave, median, ratio
from bench.sides import SIDES, Side
from bench.step import Variant, steps

REAL_LAYERS, QUICK_LAYERS = 30, 8
GROWTH_LAYERS = 4
SIZES = ((64, 256, 1024), (32, 128, 256), (1, 4, 16))
"""Answer tokens, thousands of tokens in the vocabulary, rows of a batch."""

Options = argparse.Namespace
Found = dict[str, Any]


def training_step(options: Options) -> Found:
    """Every method by the public recipe and by the package; NPO in all ways; the bare body."""
    quick = options.quick
    layers = min(options.layers, 4) if quick else options.layers
    case = Case(data=options.data, tokenizer=options.tokenizer, layers=layers)
    forget, retain = case.rows()
    methods = ("NPO", "SimNPO") if quick else ("NPO", "NPO+KL", "SimNPO")
    ways = ("chunked", "body") if quick else ("lean", "chunked", "padded", "whole", "checkpointed", "lora", "body")
    variants = [Variant(method, way) for method in methods for way in ("public", "packed")]
    variants += [Variant("NPO", way) for way in ways]
    if not quick and has_bf16():
        variants.append(Variant("NPO", "bf16"))
    made = steps(variants, case.model(), forget, retain)
    check_losses({name: float(step()) for name, step in made.items() if name.split(" ")[1] not in ("body", "bf16")})
    # The check of the losses was the round that warms up.
    times = interleave(made, 1 if quick else 2, warm=False)
    found = {str(v): _entry(times[str(v)], times[f"{v.method} public"]) for v in variants}
    del made
    for variant, mib in zip(variants, children.step_peaks([(case, v) for v in variants]), strict=True):
        found[str(variant)]["mib"] = mib
    for name, entry in found.items():
        base = found[f"{name.split(' ')[0]} public"]["mib"]
        entry["memory"] = None if entry["mib"] is None or not base else entry["mib"] / base
    real = sum(int(batch["attention_mask"].sum()) for batch in (forget, retain))
    cells = sum(batch["attention_mask"].numel() for batch in (forget, retain))
    tokens = {"tokens": real, "cells": cells, "scored_tokens": scored(forget, retain)}
    return {**tokens, "bf16": has_bf16(), "multiplications": _multiplications(case, forget, retain), "variants": found}


def _multiplications(case: Case, forget: Batch, retain: Batch) -> dict[str, float]:
    """Of the packed step as a part of the public recipe's, by method, attention's own left out."""
    model = case.model()
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.base_model.layers.parameters() if p.ndim == 2)
    own = 3 * (body * sum(int(b["attention_mask"].sum()) for b in (forget, retain)) + head * scored(forget, retain))
    # A backward pass has twice those of the forward pass; the reference has a forward pass alone.
    public = 3 * (body + head) * (forget["input_ids"].numel() + retain["input_ids"].numel())
    return {"NPO": own / (public + (body + head) * forget["input_ids"].numel()), "SimNPO": own / public}


def _entry(taken: Times, base: Times) -> Found:
    return {"seconds": median(taken.wall), "cpu_seconds": median(taken.cpu), "time": ratio(taken, base)}


def check_losses(losses: dict[str, float]) -> None:
    """The losses of a method agree, so that like is compared with like."""
    for name, loss in losses.items():
        base = losses[f"{name.split(' ')[0]} public"]
        # Where the terms of a loss cancel, rounding is theirs.
        if not math.isclose(loss, base, rel_tol=1e-5, abs_tol=1e-5):
            raise RuntimeError(f"the loss of {name} is {loss}, of the public recipe {base}")


def real(options: Options) -> Found:
    """On a real model's shape: whole optimizer steps, their memory, and a profile of the package's."""
    layers = _layers(options)
    found: Found = {"layers": layers, "methods": {}}
    for method in ("SimNPO", "NPO"):
        times, results, peaks = _sides("training", 1 if options.quick else 3, method=method, layers=layers)
        check_losses({f"{method} {side}": result["step"] for side, result in results.items()})
        found["methods"][method] = {**_compared(times["step"]), "mib": peaks}
    threads = torch.get_num_threads()
    found["profile"] = json.loads(in_a_process("child", "profile", json.dumps({"layers": layers}), threads=threads))
    return found


def _layers(options: Options) -> int:
    """Of the model of a real shape."""
    return QUICK_LAYERS if options.quick else REAL_LAYERS


def evaluation(options: Options) -> Found:
    """TOFU's evaluation on a real model's shape."""
    counts = (4, 8, 8, 8) if options.quick else (8, 20, 20, 24)
    times, results, peaks = _sides("evaluating", 1, warm=False, counts=counts, layers=_layers(options))
    check_scores(results)
    found = {name: _compared(of) for name, of in times.items()}
    whole = {side: _sum([of[side] for of in times.values()]) for side in SIDES}
    answers = [answer for split in results["own"]["answers"].values() for answer in split]
    tokens = [len(answer) for answer in answers]
    return {"rows": counts, "tokens": sum(tokens), "mib": peaks, "phases": {**found, "whole": _compared(whole)}}


def _sides(kind: str, rounds: int, warm: bool = True, **settings: Any) -> tuple[dict[str, Any], Found, Found]:
    """Times by phase and side, results of the first round and peak memory by side, of two processes in turn."""
    with Side(kind, "public", **settings) as public, Side(kind, "own", **settings) as own:
        sides = {"public": public, "own": own}
        taken = [{name: side() for name, side in sides.items()} for _ in range(rounds + warm)]
        peaks = {name: side.close() for name, side in sides.items()}
    results = {name: {phase: one["result"] for phase, one in taken[0][name].items()} for name in sides}
    counted = taken[warm:]
    times = {
        phase: {
            name: Times(*([one[name][phase][clock] for one in counted] for clock in ("wall", "cpu", "system")))
            for name in sides
        }
        for phase in results["own"]
    }
    return times, results, peaks


def _sum(parts: list[Times]) -> Times:
    return Times(*([sum(values) for values in zip(*of, strict=True)] for of in zip(*map(astuple, parts), strict=True)))


def _compared(of: dict[str, Times]) -> Found:
    clocks = {side: {clock: median(values) for clock, values in asdict(times).items()} for side, times in of.items()}
    return {"seconds": clocks, "time": ratio(of["own"], of["public"])}


def check_scores(results: dict[str, Any]) -> None:
    """Both sides' scores and answers agree."""
    own, public = results["own"], results["public"]
    for name, expected in public["scores"].items():
        if not np.allclose(own["scores"][name], expected, rtol=1e-5, atol=1e-6, equal_nan=True):
            raise RuntimeError(f"{name}: the package's scores are not those of the public recipe")
    if own["answers"] != public["answers"]:
        raise RuntimeError("the package's answers are not those of the public recipe")


def whole_job(options: Options) -> Found:
    """From a folder to the unlearned model: evaluation, epochs, evaluation."""
    epochs, rows = (1, 8) if options.quick else (3, 16)
    counts = dict.fromkeys(job.SPLITS, 4 if options.quick else 8)
    found = job.compare(rows, counts, epochs, _layers(options))
    time = {clock: found["own"][clock] / found["public"][clock] for clock in ("wall", "cpu")}
    return {"epochs": epochs, "rows": rows, "counts": counts, "sides": found, "time": time}


def growth(options: Options) -> Found:
    """Time and memory of an NPO step against one size at a time, by the public recipe and by the package."""
    shape = {"layers": min(options.layers, GROWTH_LAYERS)}
    answers, vocabularies, batches = SIZES
    series = {
        "answer": [Case(batch=1, answer=n, prompt=1, **shape) for n in answers],
        "vocabulary": [Case(batch=4, vocabulary=1024 * k, **shape) for k in vocabularies],
        "batch": [Case(batch=n, **shape) for n in batches],
    }
    variants = [Variant("NPO", way) for way in ("public", "packed")]
    flat = [(name, case) for name, cases in series.items() for case in cases]
    peaks = iter(children.step_peaks([(case, v) for _, case in flat for v in variants]))
    found: Found = {name: [] for name in series}
    for name, case in flat:
        times = interleave(steps(variants, case.model(), *case.rows()), 2, longest=4.0)
        found[name].append(
            {
                "size": getattr(case, name),
                "seconds": {v.way: median(times[str(v)].wall) for v in variants},
                "time": {v.way: ratio(times[str(v)], times["NPO public"]) for v in variants},
                "mib": {v.way: next(peaks) for v in variants},
            }
        )
    return found


def rows(options: Options) -> Found:
    """Time per scored token and memory of an evaluation against the number of its answers, on a small model."""
    model = children.small_model()
    sizes = (100, 400) if options.quick else (200, 600, 2000)
    questions = {size: Rows(children.VOCABULARY).questions(round(size / 6)) for size in sizes}
    made = {str(size): Losses(model, rows) for size, rows in questions.items()}
    times = interleave(made, 1 if options.quick else 2)
    found = []
    for size, mib in zip(sizes, children.scoring_peaks([round(size / 6) for size in sizes]), strict=True):
        answers = [row for question in questions[size] for row in question]
        tokens, taken = sum(row.length for row in answers), times[str(size)]
        found.append(
            {
                "answers": len(answers),
                "scored_tokens": tokens,
                "microseconds_per_token": 1e6 * median(taken.wall) / tokens,
                "cpu_microseconds_per_token": 1e6 * median(taken.cpu) / tokens,
                "mib": mib,
            }
        )
    return {"points": found}


def processes(options: Options) -> Found:
    """A step of NPO and an evaluation on one process with all cores, and on two with half of them each."""
    step = {n: children.distributed("step_time", n, rounds=2, method="NPO") for n in (1, 2)}
    scoring = {n: children.distributed("scoring_time", n, rounds=2, questions=150) for n in (1, 2)}
    return {"step_seconds": step, "scoring_seconds": scoring}


def lightning(options: Options) -> Found:
    """Processor time that the Trainer and its logging add to a step."""
    return overhead.added_by_lightning(30 if options.quick else 100)


def start_up(options: Options) -> Found:
    """Seconds until help is shown and until the first step."""
    return overhead.start_up(1 if options.quick else 2)


PARTS: dict[str, Callable[[Options], Found]] = {
    "real": real,
    "evaluation": evaluation,
    "job": whole_job,
    "step": training_step,
    "growth": growth,
    "rows": rows,
    "processes": processes,
    "lightning": lightning,
    "start-up": start_up,
    "gpu": gpu,
}
SLOW = ("growth", "processes")
"""Parts that a quick look leaves out."""
