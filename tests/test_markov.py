"""Markov chains: the data process and its distances by hand, the Bayes floors, the same batches for every method."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from simnpo_pl.__main__ import main
from simnpo_pl.benchmarks import MarkovData
from simnpo_pl.benchmarks import markov as chains
from simnpo_pl.benchmarks.markov import CHAINS, INITIAL, TRANSITIONS, bayes_floors, sample
from simnpo_pl.models.logprobs import AnswerLogps, divergence
from simnpo_pl.objectives import ForgetInputs, LengthNormalizedNPO, ReferenceFreeNPO
from simnpo_pl.studies import markov

TINY = chains.Size(sequences=80, width=8, epochs=1, test_rows=4)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chains.SIZES, "small", TINY)


def test_transition_rows_by_hand():
    """0.8 over three own states is 0.2667 each, 0.2 over seven others 0.02857; rows of foreign states are uniform."""
    assert TRANSITIONS.sum(axis=2) == pytest.approx(np.ones((3, 10)))
    own, other = 0.8 / 3, 0.2 / 7
    assert TRANSITIONS[1][4].tolist() == pytest.approx([other] * 3 + [own] * 3 + [other] * 4)
    assert TRANSITIONS[1][0].tolist() == TRANSITIONS[2][9].tolist() == pytest.approx([0.1] * 10)
    assert INITIAL[2, 6:9].tolist() == pytest.approx([own] * 3)


def test_distances_by_hand():
    """KL(own row || uniform) = 0.8 log(2.667) + 0.2 log(0.2857) = 0.534 nats; the other way round 0.583."""
    own, uniform = (torch.tensor(TRANSITIONS[0][state]).log() for state in (0, 5))
    first = 0.8 * math.log(8 / 3) + 0.2 * math.log(2 / 7)
    assert divergence(own, uniform).item() == pytest.approx(first)
    assert first == pytest.approx(0.534, abs=5e-4)
    assert divergence(uniform, own).item() == pytest.approx(0.583, abs=5e-4)


def test_samples_follow_the_chain():
    """Frequencies of 200,000 transitions against the rows; own states hold 0.8 at first and 0.6 in the long run."""
    states = sample(1, 10000, 21, seed=3)
    counts = np.zeros((10, 10))
    np.add.at(counts, (states[:, :-1].ravel(), states[:, 1:].ravel()), 1)
    assert np.abs(counts / counts.sum(axis=1, keepdims=True) - TRANSITIONS[1]).max() < 0.01
    inside = ((states >= 3) & (states < 6)).mean(axis=0)
    assert inside[0] == pytest.approx(0.8, abs=0.015)
    assert inside[10:].mean() == pytest.approx(0.6, abs=0.015)


def test_retain_and_forget1_do_not_depend_on_forget2():
    short, long = (chains.sequences(TINY, length, 5, train=True) for length in (5, 20))
    assert short["retain"] == long["retain"]
    assert short["forget1"] == long["forget1"]
    assert [row.length for row in short["forget2"]] == [4] * 16
    assert [len(part) for part in long.values()] == [32, 16, 16]
    test = chains.sequences(TINY, 20, 5, train=False)
    assert [len(part) for part in test.values()] == [4, 4, 4]
    assert short["retain"] != chains.sequences(TINY, 5, 6, train=True)["retain"]


@pytest.mark.parametrize(
    ("weights", "length", "expected"),
    [
        ((2, 1, 1), 5, {"retain": 0.0187, "forget1": 0.0361, "forget2": 0.0677}),
        ((2, 1, 0), 20, {"retain": 0.0114, "forget1": 0.0248, "forget2": 0.411}),
        ((1, 0, 0), 20, {"retain": 0.0, "forget1": 0.426, "forget2": 0.427}),
        ((1, 0, 0), 5, {"forget2": 0.446}),
    ],
)
def test_bayes_floors(weights: tuple[int, ...], length: int, expected: dict[str, float]):
    """Values of an independent simulation with 4,000 sequences, within 5 %."""
    found = bayes_floors(np.array(weights, dtype=float), length, count=20000)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.05, abs=1e-9)


def test_bayes_floors_of_equals():
    """With equal shares and lengths both forget chains have one floor; the simulation has 0.0347 and 0.0325 for it."""
    found = bayes_floors(np.array([2.0, 1.0, 1.0]), 20, count=20000)
    assert found["retain"] == pytest.approx(0.0192, rel=0.05)
    assert found["forget1"] == pytest.approx(found["forget2"], rel=0.03)
    assert (found["forget1"] + found["forget2"]) / 2 == pytest.approx((0.0347 + 0.0325) / 2, rel=0.05)


def test_ablations_by_hand():
    """L = -2 over 2 tokens, reference -4: per token 1 nat above, so 2 log(1 + e) at beta 1; without it -L = 2 nats."""
    logps = AnswerLogps(torch.tensor([-2.0]), torch.tensor([2.0]))
    inputs = ForgetInputs(forget=logps, reference_forget=torch.tensor([-4.0]))
    assert LengthNormalizedNPO(1.0)(inputs).item() == pytest.approx(2 * math.log(1 + math.e), rel=1e-6)
    assert ReferenceFreeNPO(0.5)(inputs).item() == pytest.approx(4 * math.log(1 + math.exp(-1)), rel=1e-6)


def test_models_know_what_they_saw(tmp_path: Path):
    """Trained on a quarter of the small study: the start model is near its floor on what it saw, the other is not."""
    size = chains.Size(sequences=1600, epochs=6, test_rows=50)
    chains.prepare(tmp_path, size, 20, knows_forget2=False, seed=0)
    data = MarkovData(str(tmp_path), forget2_length=20)
    data.size = size
    from simnpo_pl.studies.markov import measure_once

    start, retrained = (measure_once(str(tmp_path / name), data) for name in ("start", "retrained"))
    assert start["retain"] < 0.08
    assert start["forget1"] < 0.2 < retrained["forget1"]
    assert start["forget2"] > 0.3
    before = (tmp_path / "start" / "model.safetensors").stat().st_mtime_ns
    chains.prepare(tmp_path, size, 20, knows_forget2=False, seed=0)
    assert (tmp_path / "start" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "other", [{"forget2_length": 20}, {"forget2_length": 5, "knows_forget2": False}, {"seed": 1}, {"size": "paper"}]
)
def test_models_of_other_settings_are_made_anew(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
):
    monkeypatch.setitem(chains.SIZES, "paper", replace(TINY, width=16))
    file = tmp_path / "start" / "model.safetensors"
    MarkovData(str(tmp_path)).prepare_data()
    first = file.read_bytes()
    MarkovData(str(tmp_path), **other).prepare_data()
    assert file.read_bytes() != first
    MarkovData(str(tmp_path)).prepare_data()
    assert file.read_bytes() == first
    shutil.rmtree(file.parent)
    MarkovData(str(tmp_path)).prepare_data()
    assert file.read_bytes() == first


def test_every_method_sees_the_same_batches(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from simnpo_pl.module.unlearning import UnlearningModule
    from simnpo_pl.studies.markov import unlearn

    seen: list[list[int]] = []
    usual = UnlearningModule.losses

    def losses(self: UnlearningModule, batch: dict) -> dict:
        seen[-1] += batch["forget"]["index"].tolist()
        return usual(self, batch)

    monkeypatch.setattr(UnlearningModule, "losses", losses)
    setting = markov.Setting(steps=4, stop=math.inf)
    curves = []
    for objective, settings in markov.METHODS.values():
        data = MarkovData(str(tmp_path), effective_batch=4, per_device_batch=4, seed=2)
        data.prepare_data()
        seen.append([])
        curves.append(unlearn(str(tmp_path / "start"), data, setting, objective, settings))
    assert len(seen[0]) == 16
    assert all(batches == seen[0] for batches in seen)
    assert all([point["step"] for point in curve] == [0, 2, 4] for curve in curves)
    assert all(curve[0] == curves[0][0] for curve in curves)


def test_level_between_evaluations():
    """Half way from 0.04 to 0.06: half way between the forget distances."""
    curve = [
        {"step": 0, "retain": 0.04, "forget1": 0.1, "forget2": 0.2},
        {"step": 2, "retain": 0.06, "forget1": 0.3, "forget2": 0.6},
    ]
    assert markov.at_level(curve, 0.05) == pytest.approx({"forget1": 0.2, "forget2": 0.4})
    assert markov.at_level(curve, 0.06) == pytest.approx({"forget1": 0.3, "forget2": 0.6})
    assert markov.at_level(curve, 0.07) is None


def test_seeds_that_do_not_reach_a_level():
    """One of two seeds reaches 0.10: the cell says so. The band ends where the lower seed is highest, at 0.8."""

    def curve(top: float) -> list[dict[str, float]]:
        return [{"step": s, "retain": s * top, "forget1": s * 0.8, "forget2": s * 0.8} for s in (0, 1)]

    methods = [dict.fromkeys(markov.METHODS, curve(top)) for top in (0.08, 0.2)]
    point = {"retain": 0.0, "forget1": 0.0, "forget2": 0.0}
    results = [
        {"length": 5, "seed": s, "methods": m, "start": point, "retrained": point} for s, m in enumerate(methods)
    ]
    row = next(line for line in markov.table(results).splitlines() if line.startswith("| GA |"))
    assert row.split(" | ")[1:3] == ["0.35 ± 0.21", "0.40 ± 0.00 (1 of 2)"]
    axis = Figure().subplots()
    markov._draw(axis, [curve(0.08), curve(0.2)], "forget1", "GA", "k")
    assert axis.lines[0].get_xydata()[-1] == pytest.approx([0.08, (0.8 + 0.32) / 2])


def test_command(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """In this process, with tiny models and two steps; a second call takes up the results, another study is refused."""
    monkeypatch.setitem(markov.SETTINGS, "small", markov.Setting(steps=2))

    def study(folder: Path, setting: markov.Setting, seeds: list[int], processes: int) -> list:
        return [markov.compare(folder, setting, length, seed) for seed in seeds for length in markov.LENGTHS]

    monkeypatch.setattr(markov, "study", study)
    out = tmp_path / "study"
    main(["markov", "--out", str(out), "--seeds", "7"])
    shown = capsys.readouterr().out
    assert "| SimNPO, beta 4 |" in shown
    assert (out / "trade_off.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "study.json").read_text())
    assert [(r["length"], r["seed"]) for r in content["results"]] == [(5, 7), (20, 7)]
    monkeypatch.delattr(markov, "study")
    main(["markov", "--out", str(out), "--seeds", "7"])
    for options, message in (
        (["--out", str(out), "--seeds", "8"], "holds a study of other settings or seeds"),
        (["--seeds", "1", "1"], "--seeds: must be different numbers"),
        (["--processes", "0"], "--processes: must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["markov", *options])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_won_seeds():
    """SimNPO at 0.3 against 0.2 in one seed, at 0.1 against 0.2 in another."""

    def run(ours: float) -> dict:
        def curve(value: float) -> list[dict[str, float]]:
            return [{"step": s, "retain": r, "forget1": value, "forget2": value} for s, r in ((0, 0.0), (1, 0.2))]

        return {"methods": {m: curve(ours if m.startswith("SimNPO") else 0.2) for m in markov.METHODS}}

    assert markov.won([run(0.3), run(0.1)], "forget1") == "on 1 of 2 seeds."


def test_fit_by_config(tiny: None, tmp_path: Path):
    """The command line's run: models made on first use, three distances measured, and bad options refused."""
    folder = tmp_path / "models"
    options = ["--config", str(Path(__file__).parents[1] / "configs" / "markov.yaml"), "--data.path", str(folder)]
    options += ["--model.name", str(folder / "start"), "--eval.retrained", str(folder / "retrained")]
    options += ["--trainer.max_steps", "2", "--eval.cache_dir", "null", "--trainer.enable_progress_bar", "false"]
    main(["fit", *options, "--run_dir", str(tmp_path / "run"), "--debug"])
    content = json.loads((tmp_path / "run" / "results.json").read_text())
    for model in ("start", "retrained", "final"):
        assert set(content[model]["metrics"]) == {f"{name}/distance" for name in CHAINS}
    assert content["counts"]["retain/distance"] == 4
    with pytest.raises(Exception, match=r"--data.forget2_length must be between 2 and 20, got 1"):
        main(["fit", *options, "--data.forget2_length", "1", "--run_dir", str(tmp_path / "no"), "--debug"])
