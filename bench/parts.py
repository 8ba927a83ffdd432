"""The parts of a benchmark, each a function from the options to what it found."""

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import baseline, children, overhead
from bench.cases import Case
from bench.data import Rows, scored
from bench.evaluation import Answers, Losses, ends
from bench.measure import Times, interleave, median, ratio
from bench.step import METHODS, Variant, steps

Options = argparse.Namespace
Found = dict[str, Any]


def training_step(options: Options) -> Found:
    """Every method by the public recipe and by the package; NPO in all ways; the bare body."""
    quick = options.quick
    case = Case(data=options.data, tokenizer=options.tokenizer)
    forget, retain = case.rows()
    ways = ("chunked", "body") if quick else ("chunked", "padded", "whole", "checkpointed", "lora", "body")
    variants = [Variant(method, way) for method in METHODS for way in ("public", "packed")]
    variants += [Variant("NPO", way) for way in ways]
    made = steps(variants, case.model(), forget, retain)
    _check_losses({name: float(step()) for name, step in made.items() if "body" not in name})
    times = interleave(made, 2 if quick else 7)
    found = {str(v): _entry(times[str(v)], times[f"{v.method} public"]) for v in variants}
    del made
    if not quick:
        # Slow on a processor without such numbers, so in fewer rounds.
        half = steps([Variant("NPO", "public"), Variant("NPO", "bf16")], case.model(), forget, retain)
        times = interleave(half, 2)
        found["NPO bf16"] = _entry(times["NPO bf16"], times["NPO public"])
    for variant in [Variant("NPO", way) for way in ("public", "packed", *ways)] if quick else variants:
        found[str(variant)]["mib"] = children.step_peak(case, variant)
    for name, entry in found.items():
        base = found[f"{name.split(' ')[0]} public"].get("mib")
        if entry.get("mib") is not None and base:
            entry["memory"] = entry["mib"] / base
    real = sum(int(batch["attention_mask"].sum()) for batch in (forget, retain))
    return {"tokens": real, "scored_tokens": scored(forget, retain), "variants": found}


def _entry(taken: Times, base: Times) -> Found:
    return {"seconds": median(taken.wall), "cpu_seconds": median(taken.cpu), "time": ratio(taken, base)}


def _check_losses(losses: dict[str, float]) -> None:
    """The losses of a method agree, so that like is compared with like."""
    for name, loss in losses.items():
        base = losses[f"{name.split(' ')[0]} public"]
        if not math.isclose(loss, base, rel_tol=1e-5):
            raise RuntimeError(f"the loss of {name} is {loss}, of the public recipe {base}")


def evaluation(options: Options) -> Found:
    """Truth ratios of questions with six answers; greedy answers."""
    model = Case().model().eval()
    rows = Rows(49152, options.data, options.tokenizer)
    questions = rows.questions(12 if options.quick else 48)
    losses = Losses(model, questions)
    plain = Case().model().eval()
    prompts = [
        row.prompt_ids for row in Rows(49152, options.data, options.tokenizer).training(32 if options.quick else 96)
    ]
    limit = 100 if options.quick else 200
    eos = ends(model, prompts, limit, 49152)
    answers = Answers(model, prompts, limit, eos)
    np.testing.assert_allclose(losses(), baseline.truth_ratio_losses(plain, questions), rtol=1e-5)
    if answers() != baseline.generate(plain, prompts, limit, eos):
        raise RuntimeError("the two ways of generating differ")
    pairs = {
        "truth ratio": (lambda: baseline.truth_ratio_losses(plain, questions), losses),
        "generation": (lambda: baseline.generate(plain, prompts, limit, eos), answers),
    }
    found = {}
    for name, (public, own) in pairs.items():
        times = interleave({"public": public, "own": own}, 1 if options.quick else 3)
        found[name] = {
            "public_seconds": median(times["public"].wall),
            "own_seconds": median(times["own"].wall),
            "time": ratio(times["own"], times["public"]),
        }
    lengths = [len(row) for row in answers()]
    found["generation"] |= {"answers": len(prompts), "mean_tokens": float(np.mean(lengths)), "longest": max(lengths)}
    found["truth ratio"] |= {"answers": sum(map(len, questions))}
    return found


def growth(options: Options) -> Found:
    """Time and memory of an NPO step against one size at a time, by the public recipe and by the package."""
    quick = options.quick
    series = {
        "answer": [Case(batch=1, answer=n) for n in ((64, 512) if quick else (64, 128, 256, 512, 1024, 2048))],
        "vocabulary": [Case(batch=4, vocabulary=1024 * k) for k in ((32, 128) if quick else (32, 64, 128, 256))],
        "batch": [Case(batch=n) for n in ((1, 4) if quick else (1, 2, 4, 8, 16))],
    }
    if not quick:
        series["block"] = [Case(batch=1, answer=2047, prompt=1)]
    variants = [Variant("NPO", way) for way in ("public", "packed", "chunked")]
    found = {}
    for name, cases in series.items():
        points = []
        for case in cases:
            size = getattr(case, "answer" if name == "block" else name)
            made = steps(variants, case.model(), *case.rows())
            times = interleave(made, 1 if quick else 2)
            points.append(
                {
                    "size": size,
                    "seconds": {v.way: median(times[str(v)].wall) for v in variants},
                    "time": {v.way: ratio(times[str(v)], times["NPO public"]) for v in variants},
                    "mib": {v.way: children.step_peak(case, v) for v in variants},
                }
            )
        found[name] = points
    return found


def rows(options: Options) -> Found:
    """Time per scored token and memory of an evaluation against the number of its answers, on a small model."""
    model = children._small_model()
    sizes = (400, 1200) if options.quick else (400, 1000, 2000, 4000)
    questions = {size: Rows(children.VOCABULARY).questions(round(size / 6)) for size in sizes}
    made = {str(size): Losses(model, rows) for size, rows in questions.items()}
    times = interleave(made, 1 if options.quick else 3)
    found = []
    for size in sizes:
        answers = [row for question in questions[size] for row in question]
        tokens = sum(row.length for row in answers)
        found.append(
            {
                "answers": len(answers),
                "scored_tokens": tokens,
                "microseconds_per_token": 1e6 * median(times[str(size)].wall) / tokens,
                "cpu_microseconds_per_token": 1e6 * median(times[str(size)].cpu) / tokens,
                "mib": children.scoring_peak(round(size / 6)),
            }
        )
    return {"points": found}


def processes(options: Options) -> Found:
    """A step of NPO and an evaluation on one process with all cores, and on two with half of them each."""
    rounds = 1 if options.quick else 3
    step = {n: children.distributed("step_time", n, rounds=rounds, method="NPO") for n in (1, 2)}
    count = 60 if options.quick else 200
    scoring = {n: children.distributed("scoring_time", n, rounds=rounds, questions=count) for n in (1, 2)}
    return {"step_seconds": step, "scoring_seconds": scoring}


def lightning(options: Options) -> Found:
    """Processor time that the Trainer and its logging add to a step."""
    return overhead.added_by_lightning(30 if options.quick else 100)


def start_up(options: Options) -> Found:
    """Seconds until help is shown and until the first step."""
    return overhead.start_up(1 if options.quick else 3)


PARTS: dict[str, Callable[[Options], Found]] = {
    "step": training_step,
    "evaluation": evaluation,
    "growth": growth,
    "rows": rows,
    "processes": processes,
    "lightning": lightning,
    "start-up": start_up,
}
