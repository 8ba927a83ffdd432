"""The parts of a benchmark, each a function from the options to what it found."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import baseline, children, overhead
from bench.cases import Case
from bench.data import Batch, Rows, scored
from bench.evaluation import Answers, Losses
from bench.measure import Times, has_bf16, interleave, median, ratio
from bench.step import METHODS, Variant, steps

EOS = 2
GROWTH_LAYERS = 4
SIZES = ((64, 256, 1024, 2048), (32, 64, 128, 256), (1, 4, 16))
"""Answer tokens, thousands of tokens in the vocabulary, rows of a batch."""

Options = argparse.Namespace
Found = dict[str, Any]


def training_step(options: Options) -> Found:
    """Every method by the public recipe and by the package; NPO in all ways; the bare body."""
    quick = options.quick
    case = Case(data=options.data, tokenizer=options.tokenizer, layers=options.layers)
    forget, retain = case.rows()
    methods = ("NPO", "SimNPO") if quick else tuple(METHODS)
    ways = ("chunked", "body") if quick else ("lean", "chunked", "padded", "whole", "checkpointed", "lora", "body")
    variants = [Variant(method, way) for method in methods for way in ("public", "packed")]
    variants += [Variant("NPO", way) for way in ways]
    if not quick:
        variants += [Variant("SimNPO", "lean"), *([Variant("NPO", "bf16")] if has_bf16() else [])]
    made = steps(variants, case.model(), forget, retain)
    check_losses({name: float(step()) for name, step in made.items() if name.split(" ")[1] not in ("body", "bf16")})
    times = interleave(made, 2 if quick else 3)
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


def evaluation(options: Options) -> Found:
    """Truth ratios of questions with six answers; greedy answers."""
    case = Case(layers=options.layers)
    own, plain = case.model().eval(), case.model().eval()
    rows = Rows(case.vocabulary, options.data, options.tokenizer)
    questions = rows.questions(16 if options.quick else 32)
    asked = rows.training(32 if options.quick else 96)
    prompts, lengths = [row.prompt_ids for row in asked], [row.length - 1 for row in asked]
    losses, answers = Losses(own, questions), Answers(own, prompts, lengths, EOS)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "truth ratio": (lambda: baseline.truth_ratio_losses(plain, questions), losses),
        "generation": (lambda: baseline.generate(plain, prompts, lengths, EOS), answers),
    }
    found = {}
    for name, (public, ours) in pairs.items():
        results: dict[str, Any] = {}
        works = {"public": _kept(results, "public", public), "own": _kept(results, "own", ours)}
        times = interleave(works, 1 if options.quick else 3)
        if not np.allclose(_flat(results["own"]), _flat(results["public"]), rtol=1e-5, atol=0):
            raise RuntimeError(f"{name}: the package's results are not those of the public recipe")
        seconds = {f"{way}_seconds": median(times[way].wall) for way in works}
        found[name] = {**seconds, "time": ratio(times["own"], times["public"])}
    found["truth ratio"] |= {"answers": sum(map(len, questions))}
    found["generation"] |= {
        "answers": len(prompts),
        "mean_tokens": float(np.mean(lengths)),
        "longest": max(lengths),
    }
    return found


def _kept(results: dict[str, Any], name: str, work: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        results[name] = work()

    return run


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [len(rows), *map(len, rows), *(value for row in rows for value in row)]


def growth(options: Options) -> Found:
    """Time and memory of an NPO step against one size at a time, by the public recipe and by the package."""
    quick, shape = options.quick, {"layers": min(options.layers, GROWTH_LAYERS)}
    answers, vocabularies, batches = ((64, 256), (32, 64), (1, 4)) if quick else SIZES
    series = {
        "answer": [Case(batch=1, answer=n, prompt=1, **shape) for n in answers],
        "vocabulary": [Case(batch=4, vocabulary=1024 * k, **shape) for k in vocabularies],
        "batch": [Case(batch=n, **shape) for n in batches],
    }
    variants = [Variant("NPO", way) for way in ("public", "packed", "chunked")]
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
    sizes = (400, 800) if options.quick else (400, 1200, 4000)
    questions = {size: Rows(children.VOCABULARY).questions(round(size / 6)) for size in sizes}
    made = {str(size): Losses(model, rows) for size, rows in questions.items()}
    times = interleave(made, 1 if options.quick else 3)
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
    rounds = 1 if options.quick else 2
    step = {n: children.distributed("step_time", n, rounds=rounds, method="NPO") for n in (1, 2)}
    count = 60 if options.quick else 150
    scoring = {n: children.distributed("scoring_time", n, rounds=rounds, questions=count) for n in (1, 2)}
    return {"step_seconds": step, "scoring_seconds": scoring}


def lightning(options: Options) -> Found:
    """Processor time that the Trainer and its logging add to a step."""
    return overhead.added_by_lightning(30 if options.quick else 100)


def start_up(options: Options) -> Found:
    """Seconds until help is shown and until the first step."""
    return overhead.start_up(1 if options.quick else 2)


PARTS: dict[str, Callable[[Options], Found]] = {
    "step": training_step,
    "evaluation": evaluation,
    "growth": growth,
    "rows": rows,
    "processes": processes,
    "lightning": lightning,
    "start-up": start_up,
}
