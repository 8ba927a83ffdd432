"""Gradient weights: the paper's formulas by hand, the derivative of the model itself, one line a row and epoch."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import results
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.logprobs import AnswerLogps
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import DPO, IDK, NPO, WGA, FineTune, ForgetInputs, GradDiff, Objective, SimNPO
from simnpo_pl.runs.history import GradientWeights
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.weights import by_length

CLI = Callable[..., None]
LN3 = math.log(3)


def inputs(total: list[float], length: list[float], reference: list[float] | None = None) -> ForgetInputs:
    forget = AnswerLogps(*(torch.tensor(v, dtype=torch.float64) for v in (total, length)))
    held = {} if reference is None else {"reference_forget": torch.tensor(reference, dtype=torch.float64)}
    return ForgetInputs(forget=forget, **held)


def weights(objective: Objective, rows: ForgetInputs) -> list[float]:
    rows.forget.total.requires_grad_()
    found = objective.gradient_weights(rows, objective(rows))
    assert found is not None
    return found.tolist()


def test_npo_weight():
    """beta 1/2. Policy equal to its reference: 1, whatever the answer. L - L_ref = -2 log 3, so the ratio of the
    powers is 1/3 and W = 2 (1/3) / (1/3 + 1) = 1/2. L - L_ref = 2 log 3: W = 2 * 3 / (3 + 1) = 3/2."""
    rows = inputs([-7.0, -1 - 2 * LN3, -1.0], [3, 4, 5], [-7.0, -1.0, -1 - 2 * LN3])
    assert weights(NPO(beta=0.5), rows) == pytest.approx([1.0, 0.5, 1.5], rel=1e-12)


def test_simnpo_weight():
    """beta 2. n 4, L = -2 log 3: pi^(beta/n) = 1/3, W' = (2/4) (1/3) / (4/3) = 1/8. L = 0, n 5: (2/5) / 2 = 1/5.

    gamma log 3 moves the logit of the first row from -log 3 to 0: (2/4) / 2 = 1/4; of the second to log 3: (2/5) 3/4.
    """
    rows = inputs([-2 * LN3, 0.0], [4, 5])
    assert weights(SimNPO(beta=2.0), rows) == pytest.approx([0.125, 0.2], rel=1e-12)
    assert weights(SimNPO(beta=2.0, gamma=LN3), rows) == pytest.approx([0.25, 0.3], rel=1e-12)


def test_other_weights():
    """Ascent weighs an answer by 1 / n, fine-tuning by minus that.

    DPO at beta 1/2 with log-ratios 2 of the refusal and 2 - 2 log 3 of the answer: 2 s(-log 3) = 1/2.
    """
    rows = inputs([-2.0, -3.0], [2, 4])
    assert weights(GradDiff(), rows) == [0.5, 0.25]
    assert weights(FineTune(), rows) == [-0.5, -0.25]
    answers = inputs([-1.0 - 2 * LN3], [3], [-3.0])
    refusals = inputs([-4.0], [2]).forget
    reference = torch.tensor([-6.0], dtype=torch.float64)
    dpo = ForgetInputs(
        forget=answers.forget,
        alternate=refusals,
        reference_forget=answers.reference_forget,
        reference_alternate=reference,
    )
    assert weights(DPO(beta=0.5), dpo) == pytest.approx([0.5], rel=1e-12)


class Detached(Objective):
    """Refusals, weighed by the answer's probability, which is held fixed."""

    needs = frozenset({"forget", "alternate"})
    calls = 0

    def forward(self, inputs: ForgetInputs) -> torch.Tensor:
        self.calls += 1
        return -inputs.forget.mean.detach().exp() * inputs.alternate.mean


def test_log_probs_that_are_read_detached(model_folder: Path, data_folder: Path):
    """The weight is 0, with other gradients and without any; the objective runs once a step, and the policy trains."""
    from simnpo_pl.benchmarks import TofuData

    forget, fixed, trained = (inputs([-2.0, -3.0], [2, 4]).forget for _ in range(3))
    trained.total.requires_grad_()
    for alternate in (fixed, trained):
        assert weights(Detached(), ForgetInputs(forget=forget, alternate=alternate)) == [0.0, 0.0]
    objective = Detached()
    module = UnlearningModule(str(model_folder), objective=objective, retain_weight=0.0, lr=1e-2)
    data = TofuData(path=str(data_folder), model=str(model_folder), effective_batch=5, per_device_batch=5)
    options = {"limit_val_batches": 0, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", **options).fit(module, data)
    assert objective.calls == 2
    assert module.forget_scores["weight"].tolist() == [0.0] * 5
    start = dict(load_causal_lm(str(model_folder)).named_parameters())
    assert not torch.equal(module.policy.lm_head.weight, start["lm_head.weight"])


def test_objectives_without_weight():
    rows = ForgetInputs(alternate=inputs([-1.0], [2]).forget)
    assert IDK().gradient_weights(rows, IDK()(rows)) is None
    assert "forget" not in WGA.needs


@given(beta=st.floats(0.05, 5), length=st.integers(1, 200), total=st.floats(-500, 0), reference=st.floats(-500, 0))
def test_weights_are_the_papers(beta: float, length: int, total: float, reference: float):
    """SimNPO paper: W = 2 pi^beta / (pi^beta + pi_ref^beta), W' = (2 / n) pi^(beta/n) / (1 + pi^(beta/n))."""
    row = inputs([total], [length], [reference])
    npo = 2 / (1 + math.exp(min(beta * (reference - total), 700)))
    power = math.exp(beta / length * total)
    simnpo = 2 / length * power / (1 + power)
    assert weights(NPO(beta), row) == pytest.approx([npo], rel=1e-9, abs=1e-300)
    assert weights(SimNPO(beta), row) == pytest.approx([simnpo], rel=1e-9, abs=1e-300)
    # The paper's bound is 2 / n; a probability is at most 1, so it is even 1 / n.
    assert 0 <= simnpo <= 1 / length
    # With no reference NPO at beta / n is SimNPO but for 1 / n.
    free = inputs([total], [length], [0.0])
    assert weights(NPO(beta / length), free) == pytest.approx([length * simnpo], rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("objective", [NPO(beta=0.3), SimNPO(beta=1.0, gamma=0.2)])
def test_weight_scales_the_gradient_of_the_log_prob(
    model_folder: Path, data_folder: Path, other_folder: Path, objective: Objective
):
    """Through the model: the forget loss's gradient is the mean over rows of weight times the log-prob's gradient."""
    from simnpo_pl.benchmarks import TofuData
    from simnpo_pl.data.training import collate

    data = TofuData(path=str(data_folder), model=str(model_folder))
    data.setup("test")
    rows = data.token_rows(("forget",))["forget"][:3]
    module = UnlearningModule(
        str(model_folder), objective=objective, retain_loss=None, forget_weight=1.0, reference=str(other_folder)
    )
    module.configure_model()
    parameters = list(module.policy.parameters())
    losses = module.losses({"forget": collate(rows)})
    whole = torch.autograd.grad(losses["loss"], parameters)
    scores = module.forget_scores
    assert not any(value.requires_grad for value in scores.values())
    expected = [torch.zeros_like(p) for p in parameters]
    for number, row in enumerate(rows):
        logps = module._scorer()({"rows": collate([row])})["rows"].logps()
        assert scores["logp"][number].item() == pytest.approx(logps.total.item(), rel=1e-5)
        assert scores["length"][number].item() == row.length
        for held, gradient in zip(expected, torch.autograd.grad(logps.total.sum(), parameters), strict=True):
            held += scores["weight"][number] * gradient / len(rows)
    for got, wanted in zip(whole, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


# -- weights.jsonl -------------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]


QUICK = ("--eval.start", "false", "--eval.final", "false", "--trainer.check_val_every_n_epoch", "100")


@pytest.fixture(scope="module")
def npo_rows(run_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of NPO on 10 forget rows, 4 a step in micro-batches of 2."""
    from simnpo_pl.__main__ import main

    folder = tmp_path_factory.mktemp("weights") / "npo"
    main(["fit", *run_options, *QUICK, "--model.objective", "NPO", "--run_dir", str(folder), "--debug"])
    return folder


def test_one_line_a_row_and_epoch(npo_rows: Path):
    rows = read(npo_rows)
    assert sorted((r["epoch"], r["index"]) for r in rows) == [(e, i) for e in (1, 2) for i in range(10)]
    assert [sum(r["step"] == s for r in rows) for s in range(1, 7)] == [4, 4, 2, 4, 4, 2]
    lengths = {r["index"]: r["length"] for r in rows if r["epoch"] == 1}
    for row in rows:
        assert row["probability"] == pytest.approx(math.exp(row["logp"] / row["length"]), rel=1e-5)
        assert row["length"] == lengths[row["index"]]
    # Before the first step the policy is its own reference; the pushed-down rows of the second epoch weigh less.
    assert [r["weight"] for r in rows if r["step"] == 1] == pytest.approx([1.0] * 4, abs=1e-4)
    assert all(r["weight"] < 0.99 for r in rows if r["epoch"] == 2)


@pytest.mark.parametrize("times", [1, 2])
def test_index_is_the_data_sets(npo_rows: Path, data_folder: Path, cli: CLI, tmp_path: Path, times: int):
    """Where some rows are trained on, too, and where each comes once for each of its two alternates."""
    chosen, options = [2, 4, 5, 6, 8], ["--trainer.max_epochs", "1", "--run_dir", str(tmp_path)]
    if times == 2:
        rows = [json.loads(line) for line in (data_folder / "forget10.json").read_text().splitlines()]
        lines = [json.dumps({"question": row["question"], "alternates": ["Bo.", "In Rome."]}) for row in rows]
        (tmp_path / "own.jsonl").write_text("\n".join(lines))
        options += ["--data.alternates", str(tmp_path / "own.jsonl")]
    objective = "NPO" if times == 1 else "AltPO"
    cli("fit", *QUICK, *options, "--model.objective", objective, "--data.forget_rows", str(chosen))
    assert [row["index"] for row in read(tmp_path)] == sorted(chosen * times)
    lengths = {row["index"]: row["length"] for row in read(npo_rows)}
    order = sorted(chosen, key=lambda index: (lengths[index], index))
    halves = {"shortest": sorted(order[:2]), "longest": sorted(order[2:])}
    assert by_length(Run("run", tmp_path, results(tmp_path))) == halves


def test_weights_follow_from_the_written_log_probs(cli: CLI, tmp_path: Path):
    settings = ("--model.objective.beta", "3", "--model.objective.gamma", "0.5")
    cli("fit", *QUICK, "--run_dir", str(tmp_path / "run"), *settings, "--trainer.max_epochs", "1")
    for row in read(tmp_path / "run"):
        power = math.exp(3 * row["logp"] / row["length"] + 0.5)
        assert row["weight"] == pytest.approx(2 / row["length"] * power / (1 + power), rel=1e-4)


def test_tensorboard_has_the_weights(npo_rows: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(npo_rows), {"histograms": 0, "scalars": 0})
    events.Reload()
    rows = read(npo_rows)
    logged = events.Scalars("train/gradient_weight")
    assert [event.step for event in logged] == list(range(6))
    for event in logged:
        own = [r["weight"] for r in rows if r["step"] == event.step + 1]
        assert event.value == pytest.approx(sum(own) / len(own), rel=1e-5)
    assert [event.step for event in events.Histograms("train/gradient_weights")] == [3, 6]


def test_resumed_run_has_every_epoch(npo_rows: Path, cli: CLI, tmp_path: Path):
    folder = tmp_path / "run"
    options = ("fit", *QUICK, "--model.objective", "NPO", "--run_dir", str(folder))
    cli(*options, "--trainer.max_steps", "3")
    (folder / "results.json").unlink()
    cli(*options, "--ckpt_path", "last")
    assert [(r["epoch"], r["index"]) for r in read(folder)] == [(e, i) for e in (1, 2) for i in range(10)]
    assert read(folder)[:10] == read(npo_rows)[:10]


def test_an_epoch_starts_without_the_last_one(tmp_path: Path):
    """A checkpoint from an epoch's end holds its rows; with those of a second process they would be added twice."""
    kept = GradientWeights(tmp_path)
    trainer: Any = SimpleNamespace(is_global_zero=True, current_epoch=0)
    lines, saved = [{"index": index, "step": 1, "weight": 1.0} for index in (0, 1)], dict[str, Any]()
    kept.on_load_checkpoint(trainer, None, {"gradient_weights": lines})
    kept.on_save_checkpoint(trainer, None, saved)
    assert saved["gradient_weights"] == lines
    kept.on_train_epoch_start(trainer, None)
    kept.on_save_checkpoint(trainer, None, saved)
    assert saved["gradient_weights"] == []


def test_no_file_without_weights(cli: CLI, tmp_path: Path):
    cli("fit", *QUICK, "--run_dir", str(tmp_path / "run"), "--model.objective", "IDK", "--trainer.max_epochs", "1")
    assert not (tmp_path / "run" / "weights.jsonl").exists()


@pytest.mark.slow
def test_two_processes_write_what_one_does(run_options: list[str], cli: CLI, tmp_path: Path):
    """Nine rows in steps of four: each process holds a part of a step, and in the last one of them has a filler row."""
    options = ["--model.objective", "NPO", "--data.train_split", "forget10[:9]", *QUICK]
    one, two = tmp_path / "one", tmp_path / "two"
    cli("fit", *options, "--run_dir", str(one))
    command = [sys.executable, "-m", "simnpo_pl", "fit", *run_options, *options, "--run_dir", str(two), "--debug"]
    command += ["--config", "configs/hardware/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone, shared = read(one), read(two)
    assert [(r["epoch"], r["index"]) for r in alone] == [(e, i) for e in (1, 2) for i in range(9)]
    for ours, theirs in zip(alone, shared, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)
    assert [sum(r["step"] == s for r in shared) for s in range(1, 7)] == [4, 4, 1, 4, 4, 1]
