"""The benchmark compares like with like, and writes what it found where it should."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import baseline, parts, report
from bench.__main__ import main
from bench.cases import Case
from bench.data import Rows
from bench.evaluation import Answers, Losses
from bench.measure import Times, interleave, ratio
from bench.parts import check_losses
from bench.step import METHODS, Variant, steps

TINY = Case(vocabulary=600, width=64, layers=1, batch=3)
WAYS = ("public", "packed", "chunked", "padded", "whole", "checkpointed")


@pytest.mark.parametrize("method", METHODS)
def test_every_way_has_the_loss_of_the_public_recipe(method: str):
    variants = [Variant(method, way) for way in WAYS]
    variants += [Variant(method, "lean")] if method in ("NPO", "SimNPO") else []
    variants += [Variant(method, "lora")] if method == "NPO" else []
    losses = {str(v): float(step()) for v, step in zip(variants, _steps(variants), strict=True)}
    check_losses(losses)
    assert all(math.isclose(loss, losses[f"{method} public"], rel_tol=1e-6, abs_tol=2e-6) for loss in losses.values())
    with pytest.raises(RuntimeError, match=re.escape(f"the loss of {method} packed is ")):
        check_losses({**losses, f"{method} packed": 1.001 * losses[f"{method} packed"]})


def _steps(variants: list[Variant]) -> list[Any]:
    made = steps(variants, TINY.model(), *TINY.rows())
    for step in made.values():
        # Away from the start, where policy and reference agree whatever is made of them.
        with torch.no_grad():
            for parameter in step.model.parameters():
                parameter.mul_(1.3)
    return [made[str(variant)] for variant in variants]


def test_evaluations_agree():
    model, rows = TINY.model(), Rows(TINY.vocabulary)
    questions, asked = rows.questions(5), rows.training(20)
    expected = baseline.truth_ratio_losses(model.eval(), questions, size=4)
    for found, own in zip(Losses(model, questions)(), expected, strict=True):
        assert found == pytest.approx(own, rel=1e-5)
    prompts, lengths = [row.prompt_ids for row in asked], [row.length - 1 for row in asked]
    answers = baseline.generate(model, prompts, lengths, 2, size=8)
    assert [len(answer) for answer in answers] == lengths
    assert Answers(model, prompts, lengths, 2)(at_once=7) == answers


def test_rounds_are_interleaved():
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    times = interleave(works, 2)
    assert order == ["a", "b"] * 3
    assert [len(times[name].wall) for name in works] == [2, 2]
    order.clear()
    assert [len(one.cpu) for one in interleave(works, 2, longest=0).values()] == [1, 1]
    assert order == ["a", "b"]
    assert ratio(Times([1.0, 2.0, 9.0], [1.0] * 3), Times([2.0, 2.0, 3.0], [4.0] * 3)) == {"wall": 1.0, "cpu": 0.25}


def record() -> dict[str, Any]:
    """Of made-up numbers."""

    def entry(part: float) -> dict[str, Any]:
        return {"seconds": 5 * part, "time": {"wall": part, "cpu": part}, "mib": 600 * part, "memory": part}

    def point(size: int) -> dict[str, Any]:
        ways = {"public": 2.0 * size, "packed": 1.0 * size, "chunked": 1.5 * size}
        return {"size": size, "seconds": ways, "mib": ways, "time": {way: {"wall": 0.5} for way in ways}}

    names = [f"{method} {way}" for method in ("NPO", "SimNPO") for way in ("public", "packed")]
    variants = {name: entry(1.0 if "public" in name else 0.45) for name in [*names, "NPO body"]}
    evaluation = {"public_seconds": 10.0, "own_seconds": 4.0, "time": {"wall": 0.4, "cpu": 0.4}, "answers": 96}
    scored = [
        {"answers": n, "microseconds_per_token": t, "cpu_microseconds_per_token": t, "mib": 50.0}
        for n, t in ((400, 100.0), (4000, 105.0))
    ]
    return {
        "command": "python -m bench", "minutes": 1.0, "texts": "random",
        "machine": {"cpu": "a processor", "instructions": "AVX2", "cores": 2, "threads": 2, "system": "Linux",
                    "load_average": [0.1], "versions": {"torch": "2.13.0"}},
        "step": {"tokens": 900, "cells": 1200, "scored_tokens": 500, "bf16": False, "variants": variants,
                 "multiplications": {"NPO": 0.51, "SimNPO": 0.6}},
        "evaluation": {"truth ratio": evaluation, "generation": {**evaluation, "mean_tokens": 35.0, "longest": 90}},
        "growth": {name: [point(1), point(2)] for name in ("answer", "vocabulary", "batch")},
        "rows": {"points": scored},
        "processes": {"step_seconds": {1: 2.0, 2: 1.0}, "scoring_seconds": {1: 2.0, 2: 1.5}},
        "lightning": {"plain loop": 10.0, "Trainer": 11.0, "Trainer, logging, bar": 14.0},
        "start-up": {"--help": 0.3, "report": 0.9, "fit, to its first step": 11.0},
    }  # fmt: skip


def test_page_keeps_its_text(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{report.BEGIN}\nold numbers\n{report.END}\n\nAfter\n")
    report.write(record(), tmp_path / "out", page)
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\n\nAfter\n")
    assert "old numbers" not in text
    assert "| SimNPO step, time as a part of the public recipe's | 0.50 | 0.45 | yes |" in text
    assert "| NPO step, time as a part of the public recipe's | 0.43 | 0.45 | no |" in text
    assert "| what Trainer and logging add to a step of 200 ms, as a part of it | 0.05 | 0.02 | yes |" in text
    assert "| fit, to its first step, seconds | 10.00 | 11.00 | no |" in text
    assert "25 % of the padded rows padding" in text
    for figure in (tmp_path / "figures" / "performance.png", tmp_path / "out" / "performance.png"):
        assert figure.read_bytes()[:4] == b"\x89PNG"


def test_parts_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = record()
    few = {key: whole[key] for key in ("command", "minutes", "texts", "machine", "lightning")}
    report.write(few, tmp_path)
    assert "Trainer, logging, bar" in capsys.readouterr().out
    assert not (tmp_path / "performance.png").exists()


def test_a_part_measured_again_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write(record(), out, page)
    again = {"plain loop": 10.0, "Trainer": 11.0, "Trainer, logging, bar": 20.046}
    monkeypatch.setitem(parts.PARTS, "lightning", lambda options: again)
    words = ["--only", "lightning", "--out", str(out), "--write", str(page)]
    monkeypatch.setattr("sys.argv", ["bench", *words])
    main()
    text = page.read_text()
    assert f"Part `lightning` was measured again by `python -m bench {' '.join(words)}`, load average " in text
    # Two digits would not tell on which side of 0.05 it is.
    assert "| what Trainer and logging add to a step of 200 ms, as a part of it | 0.05 | 0.050 | no |" in text
    assert "| SimNPO step, time as a part of the public recipe's | 0.50 | 0.45 | yes |" in text
    assert "| NPO step | 2.00 | 1.00 | 2.00 |" in text
    assert "`python -m bench`, 1.0 minutes on a processor" in text
