"""What a user runs on a real model's shape, by the public recipe and by the package: `own`.

Each side is a process of its own, which waits for its turn: its settings and its memory are its own.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bench import baseline
from bench.cases import Case
from bench.data import Rows, freeze, real_model
from bench.evaluation import Whole
from bench.measure import thread_environment
from bench.step import Step, Variant
from simnpo_pl.module.optimization import adamw

SIDES = ("public", "own")
LR, CLIP = 1e-5, 1.0
NEW_TOKENS = 48
EOS = 2

Phases = Mapping[str, Callable[[], Any]]
"""Work by name; what it returns is compared with that of the other side."""


class Side:
    """A side in its process, ready to work.

    Args:
        kind: Key of `KINDS`.
        side: One of `SIDES`.
        settings: Arguments of the kind's function.
    """

    def __init__(self, kind: str, side: str, **settings: Any) -> None:
        self.name = f"{kind}, {side}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench", "child", "serve", json.dumps({"kind": kind, "side": side, **settings})],
            env=thread_environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()

    def __call__(self) -> dict[str, Any]:
        """One round: by phase `wall`, `cpu` and `system` seconds and its `result`."""
        self._say("work")
        return self._answer()

    def close(self) -> float:
        """End the process; its peak resident memory, MiB."""
        self._say("end")
        return self._answer()

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def _say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended; it says above why")
        return json.loads(line)


# -- in the other process --------------------------------------------------------------------------------


def serve(kind: str, side: str, **settings: Any) -> float:
    """Make the work ready, do it whenever a line asks for it; returns the peak resident memory, MiB."""
    phases = KINDS[kind](side, **settings)
    print("null", flush=True)
    while sys.stdin.readline().strip() == "work":
        print(json.dumps({name: _timed(work) for name, work in phases.items()}), flush=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _timed(work: Callable[[], Any]) -> dict[str, Any]:
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    result = work()
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - wall
    system = after.ru_stime - before.ru_stime
    return {"wall": wall, "cpu": after.ru_utime - before.ru_utime + system, "system": system, "result": result}


def training(side: str, method: str, layers: int = 30, rows: int = 8) -> Phases:
    """A whole optimizer step: forward and backward pass, clipping, AdamW. The result is the loss."""
    model = real_model(layers).train()
    return {"step": optimizer_step(side, method, model, Case(batch=rows).rows())}


def optimizer_step(side: str, method: str, model: Any, rows: Sequence[Any]) -> Callable[[], float]:
    """A step of a side on its model and one batch."""
    variant = Variant(method, "packed" if side == "own" else "public")
    reference = None
    if variant.holds_reference:
        reference = freeze(type(model)(model.config))
        reference.load_state_dict(model.state_dict())
    step = Step(variant, model, reference, *rows)
    if side == "own":
        optimizer = adamw(model, LR, (0.9, 0.999), 0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01, fused=True)

    def work() -> float:
        loss = step.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return work


def evaluating(side: str, counts: Sequence[int], layers: int = 30) -> Phases:
    """TOFU's evaluation: forget, retain, authors, facts. The results are mean losses, and generated tokens."""
    model, rows = real_model(layers).eval(), Rows(Case.vocabulary)
    forget, retain, authors, facts = counts
    splits = {
        "forget": rows.questions(forget, 7),
        "retain": rows.questions(retain, 7),
        "authors": rows.facts(authors),
        "facts": rows.facts(facts),
    }
    if side == "public":
        lengths = {name: [min(row[0].length - 1, NEW_TOKENS) for row in split] for name, split in splits.items()}
        prompts = {name: [row[0].prompt_ids for row in split] for name, split in splits.items()}
        return {
            "scores": lambda: baseline.scores(model, splits),
            "answers": lambda: {n: baseline.generate(model, prompts[n], lengths[n], EOS, 32) for n in splits},
        }
    own = Whole(model, splits, EOS, NEW_TOKENS)
    return {"scores": own.scores, "answers": own.answers}


KINDS: dict[str, Callable[..., Phases]] = {"training": training, "evaluating": evaluating}
