"""The benchmark compares like with like, and writes what it found where it should."""

import json
import math
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bench import baseline, gpu, job, overhead, parts, report
from bench.__main__ import main
from bench.cases import Case
from bench.data import Rows, scored
from bench.evaluation import Losses
from bench.measure import Times, interleave, ratio
from bench.parts import check_losses, check_scores
from bench.profile import KINDS, step_profile
from bench.sides import Side
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


def test_losses_agree():
    model, rows = TINY.model(), Rows(TINY.vocabulary)
    questions = rows.questions(5)
    expected = baseline.truth_ratio_losses(model.eval(), questions, size=4)
    for found, own in zip(Losses(model, questions)(), expected, strict=True):
        assert found == pytest.approx(own, rel=1e-5)


def test_both_sides_of_a_real_shape_agree():
    """In processes of their own, as they are measured."""
    times, results, peaks = parts._sides("training", 1, method="NPO", layers=1, rows=2)
    check_losses({f"NPO {side}": result["step"] for side, result in results.items()})
    assert [len(times["step"]["own"].cpu), len(times["step"]["public"].system)] == [1, 1]
    # AdamW's two moments, gradients and weights of 32 million parameters.
    assert all(peak > 4 * 4 * 32 for peak in peaks.values())
    _, results, _ = parts._sides("evaluating", 1, warm=False, layers=1, counts=(2, 1, 2, 1))
    check_scores(results)
    results["own"]["scores"]["forget"][0][0] *= 1.001
    with pytest.raises(RuntimeError, match="forget: the package's scores are not those of the public recipe"):
        check_scores(results)
    results["own"]["scores"], results["own"]["answers"] = results["public"]["scores"], {}
    with pytest.raises(RuntimeError, match="the package's answers are not those of the public recipe"):
        check_scores(results)


def test_a_side_that_fails_says_so():
    with (
        pytest.raises(RuntimeError, match="the process of training, own ended; it says above why"),
        Side("training", "own"),
    ):
        pass


def test_profile_of_a_step():
    found = step_profile(layers=1, rows=2, rounds=1)
    seconds = {kind: sum(o["seconds"] for o in found["operators"] if o["kind"] == kind) for kind in KINDS}
    assert all(value > 0 for value in seconds.values())
    assert seconds["multiplications"] == max(seconds.values())
    assert 0 < found["body_seconds"] < found["head_seconds"]
    # Forward and backward pass have 6 operations for each weight and token.
    forget, retain = Case(batch=2).rows()
    tokens = sum(int(part["attention_mask"].sum()) for part in (forget, retain))
    body, head = 576 * (2 * 576 + 2 * 192 + 3 * 1536), 576 * 49152
    operations = 6 * (body * tokens + head * scored(forget, retain))
    assert found["gflops"] == pytest.approx(operations / (found["body_seconds"] + found["head_seconds"]) / 1e9)


def test_a_job_by_both_sides():
    found = job.compare(rows=2, counts=dict.fromkeys(job.SPLITS, 1), epochs=1, layers=1)
    assert set(found) == {"public", "own"}
    assert all(side["cpu"] > side["system"] > 0 and side["mib"] > 100 for side in found.values())


TINY_LLAMA = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """In the place of inductor, which takes longer; counts graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def test_parts_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_compiler: CompileCounterWithBackend):
    """They run on any device; what a part cannot do is said in its place, and the others go on."""
    card = gpu.Card(torch.device("cpu"), tmp_path, TINY_LLAMA, (2,), 2, (2,), 2)
    monkeypatch.setattr(gpu.Card, "scoring", lambda card, found: 1 / 0)
    found = card.run()
    assert found["scoring"]["error"] == "ZeroDivisionError: division by zero"
    assert [name for name in found if "error" in found[name]] == ["scoring"]
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    ways = ("package", "recipe", "compiled")
    assert found["step"].keys() == {f"{method} 2+2 {way}" for method in gpu.METHODS for way in ways} | {"seconds"}
    assert found["larger batches"].keys() == {f"4+4 {way}" for way in ways} | {"seconds"}
    assert found["changing rows"].keys() == {*ways, "seconds"}
    assert found["generation"]["float32, 8"] == {"equal_tokens": 1.0}
    assert all("aten::mm" in (tmp_path / found["profile"][way]["kernels"]).read_text() for way in ways)
    # Rows that begin alike have a graph of their own.
    assert quick_compiler.frame_count in (1, 2)
    text = "\n".join(gpu.tables(found))
    lines = ("| SimNPO+KL 2+2 recipe | ", "| 4+4 compiled | ", "| float32, 8 | 1.0 | ", "scoring: ZeroDivisionError: ")
    assert all(line in text for line in lines)
    assert gpu._error_of(lambda found: time.sleep(9), 1, {}) == "TimeoutError: stopped after 1 s"
    assert gpu._error_of(lambda found: None, 0.5, {}) == "no time was left"


def test_a_gpu_whose_layers_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fails))
    for part in ("generation", "waits", "scoring", "profile"):
        monkeypatch.setattr(gpu.Card, part, lambda card, found: None)
    found = gpu.Card(torch.device("cpu"), tmp_path, TINY_LLAMA, (2,)).run()
    torch._dynamo.reset()
    assert "no compiler" in found["compiling"]["error"]
    assert [name for name in found if "error" in found[name]] == ["compiling"]
    assert found["changing rows"].keys() == {"package", "recipe", "seconds"}
    assert len(found["step"]) == 7
    assert "no compiler" in "\n".join(gpu.tables(found))


@pytest.mark.slow
def test_compiled_steps_of_a_gpu_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for part in ("generation", "waits", "scoring"):
        monkeypatch.setattr(gpu.Card, part, lambda card, found: None)
    found = gpu.Card(torch.device("cpu"), tmp_path, TINY_LLAMA, (2,), seconds=600).run()
    torch._dynamo.reset()
    assert not any("error" in part for part in found.values())
    assert "Torch-Compiled Region" in (tmp_path / "profile-compiled.txt").read_text()
    assert "Torch-Compiled Region" not in (tmp_path / "profile-package.txt").read_text()


def test_both_ways_of_generation_take_turns_on_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    turns: list[tuple[str, list[list[int]]]] = []

    def way(name: str) -> Any:
        return lambda card, prompts, exact=False: turns.append((name, prompts)) or [[len(name)] * 4 for _ in prompts]

    monkeypatch.setattr(gpu.Card, "_generate", way("package"))
    monkeypatch.setattr(gpu.Card, "_transformers", way("transformers"))
    card, found = gpu.Card(torch.device("cpu"), tmp_path, TINY_LLAMA, prompts=(2, 3)), {}
    card.build({})
    card.generation(found)
    assert [way for way, _ in turns] == ["package", "transformers"] * 7
    assert [len(prompts) for _, prompts in turns] == [8] * 2 + [2] * 6 + [3] * 6
    for start, end in ((0, 2), (2, 8), (8, 14)):
        assert all(prompts == turns[start][1] for _, prompts in turns[start:end])
    assert found.pop("float32, 8") == {"equal_tokens": 0.0}
    assert found.keys() == {"package, 2", "transformers, 2", "package, 3", "transformers, 3"}
    assert all(entry.keys() == {"first_ms_per_token", "ms_per_token", "tokens_per_s"} for entry in found.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs for minutes")
def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["bench", "--only", "gpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="the part gpu needs a GPU"):
        main()


@pytest.mark.slow
def test_first_step_of_a_run(tmp_path: Path):
    wall, cpu = overhead._first_step(tmp_path, 0)
    assert 0.1 < cpu < 100 * wall
    # The folder of the first run is taken.
    with pytest.raises(RuntimeError, match=r"did not train:\n(.*\n)*.*run0"):
        overhead._first_step(tmp_path, 0)


def test_rounds_are_interleaved():
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    times = interleave(works, 2)
    assert order == ["a", "b"] * 3
    assert [len(times[name].wall) for name in works] == [2, 2]
    order.clear()
    assert [len(one.cpu) for one in interleave(works, 2, longest=0).values()] == [1, 1]
    assert order == ["a", "b"]
    order.clear()
    assert [len(one.cpu) for one in interleave(works, 2, warm=False).values()] == [2, 2]
    assert order == ["a", "b"] * 2
    assert ratio(Times([1.0, 2.0, 9.0], [1.0] * 3), Times([2.0, 2.0, 3.0], [4.0] * 3)) == {"wall": 1.0, "cpu": 0.25}


def record() -> dict[str, Any]:
    """Of made-up numbers."""

    def entry(part: float) -> dict[str, Any]:
        return {"seconds": 5 * part, "time": {"wall": part, "cpu": part}, "mib": 600 * part, "memory": part}

    def point(size: int) -> dict[str, Any]:
        ways = {"public": 2.0 * size, "packed": 1.0 * size}
        return {"size": size, "seconds": ways, "mib": ways, "time": {way: {"wall": 0.5} for way in ways}}

    names = [f"{method} {way}" for method in ("NPO", "SimNPO") for way in ("public", "packed")]
    variants = {name: entry(1.0 if "public" in name else 0.45) for name in [*names, "NPO body"]}
    seconds = {
        side: {"wall": 5 * part, "cpu": 9 * part, "system": part} for side, part in (("public", 1.0), ("own", 0.4))
    }
    compared = {"seconds": seconds, "time": {"wall": 0.4, "cpu": 0.48}}
    mib = {"public": 5000.0, "own": 4000.0}
    profile = {
        "seconds": 3.0, "body_seconds": 1.5, "head_seconds": 0.25, "gflops": 100.0,
        "operators": [{"name": "aten::mm", "kind": "multiplications", "calls": 9, "seconds": 2.0},
                      {"name": "aten::mul", "kind": "element by element", "calls": 7, "seconds": 0.99},
                      {"name": "aten::t", "kind": "element by element", "calls": 5, "seconds": 0.01}],
    }  # fmt: skip
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
        "real": {"layers": 30, "methods": {m: {**compared, "mib": mib} for m in ("SimNPO", "NPO")}, "profile": profile},
        "evaluation": {"rows": [1, 2, 3, 4], "tokens": 99, "mib": mib, "phases": {"whole": compared}},
        "job": {"epochs": 3, "rows": 16, "counts": {"forget": 4, "retain": 5}, "time": compared["time"],
                "sides": {side: {**seconds[side], "mib": mib[side]} for side in mib}},
        "growth": {name: [point(1), point(2)] for name in ("answer", "vocabulary", "batch")},
        "rows": {"points": scored},
        "processes": {"step_seconds": {1: 2.0, 2: 1.0}, "scoring_seconds": {1: 2.0, 2: 1.5}},
        "lightning": {"plain loop": 10.0, "Trainer": 11.0, "Trainer, logging, bar": 14.0},
        "start-up": {name: {"wall": 9 * cpu, "cpu": cpu}
                     for name, cpu in (("--help", 0.3), ("report", 0.9), ("fit, to its first step", 11.0))},
    }  # fmt: skip


def test_page_keeps_its_text(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{report.BEGIN}\nold numbers\n{report.END}\n\nAfter\n")
    report.write(record(), tmp_path / "out", page)
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\n\nAfter\n")
    assert "old numbers" not in text
    assert "| SimNPO step of a wide model, time as a part of the public recipe's | 0.50 | 0.45 | yes |" in text
    assert "| NPO step of a wide model, time as a part of the public recipe's | 0.43 | 0.45 | no |" in text
    step = "NPO, optimizer step of a real model's shape"
    assert f"| {step}, processor time as a part of the public recipe's | 0.45 | 0.48 | no |" in text
    assert f"| Sim{step}, peak memory of the process likewise | 0.75 | 0.80 | no |" in text
    assert "| its whole job, processor time likewise | 0.50 | 0.48 | yes |" in text
    assert "| SimNPO | package | 2.00 | 3.60 | 0.40 | 0.40 | 0.48 | 4000 | 0.80 |" in text
    assert "| `aten::mm` | multiplications | 9 | 2.00 | 66.7 % |" in text
    assert "| floor: the multiplications by themselves | 1.75 | 58.3 % |" in text
    assert "| others |  |  | 0.01 | 0.3 % |" in text
    assert "evaluation of 9 questions, 3 epochs of SimNPO on 16 + 16 rows, evaluation" in text
    assert "| what Trainer and logging add to a step of 200 ms, as a part of it | 0.05 | 0.02 | yes |" in text
    assert "| fit, to its first step, processor seconds | 10.00 | 11.00 | no |" in text
    assert "| --help | 2.70 | 0.30 |" in text
    assert "25 % of the padded rows padding" in text
    for figure in (tmp_path / "figures" / "performance.png", tmp_path / "out" / "performance.png"):
        assert figure.read_bytes()[:4] == b"\x89PNG"


def test_parts_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = record()
    few = {key: whole[key] for key in ("command", "minutes", "texts", "machine", "lightning")}
    few["machine"]["threads"] = 1
    report.write(few, tmp_path)
    out = capsys.readouterr().out
    assert "Trainer, logging, bar" in out
    assert "(AVX2, 2 cores, 1 thread, Linux)" in out
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
    assert "| SimNPO step of a wide model, time as a part of the public recipe's | 0.50 | 0.45 | yes |" in text
    assert "| NPO step | 2.00 | 1.00 | 2.00 |" in text
    assert "`python -m bench`, 1.0 minutes on a processor" in text


def test_other_parts_go_on_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page, out = tmp_path / "page.md", tmp_path / "out"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")

    def fails(options: Any) -> Any:
        raise RuntimeError("first line\nno memory left")

    works = {name: partial(lambda found, options: found, record()[name]) for name in ("lightning", "rows")}
    monkeypatch.setattr(parts, "PARTS", {"growth": fails, **works})
    words = ["bench", "--out", str(out), "--write", str(page)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "**Part `growth` failed:** RuntimeError: no memory left" in page.read_text()
    assert "| Trainer, logging, bar | 14.00 |" in page.read_text()
    assert "performance.png" not in page.read_text()
    # Measured again, it is no longer a failure.
    monkeypatch.setitem(parts.PARTS, "growth", lambda options: record()["growth"])
    monkeypatch.setattr("sys.argv", [*words, "--only", "growth"])
    main()
    assert "failed" not in page.read_text()
    assert "performance.png" in page.read_text()
