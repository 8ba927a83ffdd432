"""Custom data as a newcomer runs it: configs/own.yaml with its own learning rate, with and without retain rows."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from transformers import AutoTokenizer

from helpers import history, killed_in_epoch, results
from simnpo_pl.benchmarks import OwnData
from simnpo_pl.benchmarks.answers import PROMPTS, START_ANSWERS, keep_answers
from simnpo_pl.benchmarks.demo import train_tokenizer
from simnpo_pl.benchmarks.pretraining import batches_of, new_llama, train
from simnpo_pl.data.tokenization import PLAIN_TEMPLATE, PromptTemplate
from simnpo_pl.models.loading import load_causal_lm, save_model
from simnpo_pl.module import UnlearningModule
from simnpo_pl.module.ramp import _crossing, _Ramp, check_ramp
from simnpo_pl.objectives import FineTune
from simnpo_pl.utils.errors import UserError

ROOT = Path(__file__).parents[1]
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
WORDS = ("blue", "seven", "a river", "bread", "winter", "a ball", "gold", "France", "a tree", "the moon")
Fit = Callable[..., Path]


@pytest.fixture(scope="module")
def learned(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folders with a small model that knows its forget rows, its retain rows and an answer to every neutral prompt."""
    made: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed in made:
            return made[seed]
        folder = tmp_path_factory.mktemp("learned")
        pairs = {}
        for name in ("forget", "retain"):
            file = data_folder / ("forget10.json" if name == "forget" else "retain90.json")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            pairs[name] = [(row["question"], row["answer"]) for row in rows]
            content = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs[name])
            (folder / f"{name}.jsonl").write_text(content)
        neutral = [json.loads(line)["question"] for line in PROMPTS.read_text().splitlines()]
        known = [(prompt, f"It is {WORDS[number % len(WORDS)]}.") for number, prompt in enumerate(neutral)]
        known += pairs["forget"] + pairs["retain"]
        tokenizer = train_tokenizer([PLAIN_TEMPLATE.format(question=q, answer=a) for q, a in known])
        model = new_llama(
            seed,
            tokenizer,
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.08,
        )
        encoded = PromptTemplate(tokenizer).encode_rows(known, "known")
        generator = torch.Generator().manual_seed(seed)
        batches = batches_of(
            encoded, [torch.randperm(len(encoded), generator=generator).tolist() for _ in range(30)], 16
        )
        total = len(batches)
        train(model, batches, 3e-3, (0.9, 0.99), lambda step: min((step + 1) / 20, (total - step) / total), 1.0)
        save_model(model, tokenizer, folder / "model")
        made[seed] = folder
        return folder

    return make


@pytest.fixture
def fit(learned: Callable[[int], Path], tmp_path: Path) -> Fit:
    """Runs `fit --config configs/own.yaml` on a seed's model and forget rows; returns the run's folder."""
    from simnpo_pl.__main__ import main

    def call(name: str, *options: str, seed: int = 0) -> Path:
        os.environ.pop("SIMNPO_PL_RUN_DIR", None)
        main([*words(learned(seed)), *options, "--run_dir", str(tmp_path / name), "--debug"])
        return tmp_path / name

    return call


def words(folder: Path) -> list[str]:
    own = ["fit", "--config", str(ROOT / "configs" / "own.yaml"), "--model.name", str(folder / "model")]
    own += ["--data.forget", str(folder / "forget.jsonl"), "--trainer.accelerator", "cpu"]
    return [*own, "--eval.generate_rows", "0"]


QUICK = ("--trainer.max_epochs", "2", "--eval.start", "false", "--eval.final", "false")
QUICK += ("--trainer.check_val_every_n_epoch", "9", "--data.effective_batch", "4", "--data.per_device_batch", "2")


def moved(run: Path, metric: str) -> tuple[float, float]:
    content = results(run)
    return content["start"]["metrics"][metric], content["final"]["metrics"][metric]


# -- the story ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_config_as_it_is_forgets_and_retains(fit: Fit, learned: Callable[[int], Path], seed: int):
    run = fit("run", "--data.retain", str(learned(seed) / "retain.jsonl"), seed=seed)
    before, after = moved(run, "forget/probability")
    assert before > 0.9
    assert after < 0.3
    before, after = moved(run, "retain/probability")
    assert after > 0.8 * before
    found = results(run)["lr_auto"]
    assert 1e-4 < found["lr"] < 1e-2
    assert results(run)["settings"]["model"]["lr"] == found["lr"]
    assert found["forget"][1] <= found["forget"][0] / 2


def test_without_retain_rows_the_start_models_answers_are_retained(
    fit: Fit, learned: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
):
    """What the user did not name survives, too; with no retain loss, which has to be asked for, it does not."""
    auto = fit("auto")
    assert "warning" not in capsys.readouterr().out
    before, after = moved(auto, "forget/probability")
    assert after < before / 3
    before, after = moved(auto, "retain/probability")
    assert after > 0.8 * before
    rows = [json.loads(line) for line in (auto / START_ANSWERS).read_text().splitlines()]
    assert len(rows) > 100
    assert rows[0] == {"question": "What is the capital of Japan?", "answer": "It is blue."}
    assert results(auto)["counts"]["retain/probability"] == len(rows)
    said = f"answers to {len(rows)} neutral prompts (your other data was not measured) {before:.3g} -> {after:.3g}"
    assert said in results(auto)["verdict"]["reasons"]

    fast = ("--model.lr", "1e-2", "--eval.start", "false", "--eval.final", "false")
    fast += ("--trainer.check_val_every_n_epoch", "99")
    kept = fit("kept", *fast, "--data.retain", str(auto / START_ANSWERS))
    assert "warning" not in capsys.readouterr().out
    none = fit("none", *fast, "--data.retain", "null", "--model.retain_weight", "0")
    assert "warning: there is no retain loss, so the model may lose everything else, too" in capsys.readouterr().out
    assert probability(none / "model", rows) < probability(kept / "model", rows) - 0.1


def probability(model: Path, rows: list[dict[str, str]]) -> float:
    from simnpo_pl.data.training import collate
    from simnpo_pl.models.logprobs import Scorer

    encoded = PromptTemplate(AutoTokenizer.from_pretrained(model)).encode_rows(
        [(row["question"], row["answer"]) for row in rows], "rows"
    )
    with torch.no_grad():
        logps = Scorer(load_causal_lm(str(model)))({"x": collate(encoded)})["x"].logps()
    return float((logps.total / logps.length).exp().mean())


def test_a_resumed_run_keeps_its_answers_and_its_rate(fit: Fit, capsys: pytest.CaptureFixture[str]):
    whole = fit("whole", *QUICK)
    with killed_in_epoch(2):
        fit("run", *QUICK)
    file = whole.with_name("run") / START_ANSWERS
    written = file.stat().st_mtime_ns
    capsys.readouterr()
    run = fit("run", *QUICK, "--ckpt_path", "last")
    assert "--model.lr auto" not in capsys.readouterr().out
    assert file.stat().st_mtime_ns == written
    assert results(run)["lr_auto"]["lr"] == results(whole)["lr_auto"]["lr"]
    assert history(run) == history(whole)


# -- the rate ----------------------------------------------------------------------------------------------------------


class _AtStart(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.weights = {name: value.clone() for name, value in pl_module.policy.state_dict().items()}
        self.state = dict(trainer.optimizers[0].state)
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]


def own_fit(folder: Path, precision: Any = "32-true", **options: Any) -> tuple[UnlearningModule, _AtStart]:
    model, seen = str(folder / "model"), _AtStart()
    module = UnlearningModule(model, lr="auto", **options)
    retain = str(folder / "retain.jsonl") if module.retain_loss is not None else None
    data = OwnData(str(folder / "forget.jsonl"), retain, model=model, effective_batch=8, per_device_batch=4)
    trainer = pl.Trainer(
        max_epochs=2,
        limit_val_batches=0,
        accelerator="cpu",
        precision=precision,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
    )
    trainer.fit(module, data)
    return module, seen


@pytest.mark.parametrize("case", ["all", "adapter", "no retain loss"])
def test_the_ramp_leaves_the_model_as_it_was(learned: Callable[[int], Path], case: str):
    """Weights to the bit, no optimizer state; the first rate is the found one times the schedule's first factor."""
    from simnpo_pl.models.lora import LoraOptions

    options: dict[str, Any] = {"adapter": {"lora": LoraOptions(rank=4)}, "no retain loss": {"retain_loss": None}}.get(
        case, {}
    )
    module, seen = own_fit(learned(0), "bf16-mixed" if case == "all" else "32-true", **options)
    start = load_causal_lm(str(learned(0) / "model")).state_dict()
    changed = [name for name, value in seen.weights.items() if name in start and not torch.equal(value, start[name])]
    assert changed == []
    assert seen.state == {}
    assert module.found_rate is not None
    # Warm-up over the first of two epochs, of two steps each: half of the rate.
    assert seen.rates == pytest.approx([module.found_rate["lr"] / 2] * 2)
    assert ("retain" in module.found_rate) == (case != "no retain loss")
    if case == "adapter":
        adapters = [value for name, value in seen.weights.items() if "lora_B" in name]
        assert adapters
        assert all(not value.any() for value in adapters)


def test_a_loss_that_does_not_fall_has_no_rate(learned: Callable[[int], Path]):
    """Fine-tuning on the forget rows lowers their probability only where the rates break the model."""
    with pytest.raises(
        UserError, match=r"did not fall as the forget probability halved: from .*; give --model.lr a num"
    ):
        own_fit(learned(0), objective=FineTune(), retain_loss=None)


def test_a_probability_that_does_not_fall_has_no_rate(learned: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_Ramp, "read", lambda ramp: {"forget": 0.8 - 0.02 * ramp.number})
    with pytest.raises(
        UserError, match=r"to 0.13 this objective did not halve the forget probability: from 0.8 to 0.44;"
    ):
        own_fit(learned(0))


def test_retain_answers_do_not_end_the_ramp(
    learned: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """They halve at the second step, the forget answers at the third, at 4e-6, exactly."""
    forget, retain = (0.8, 0.8, 0.8, 0.4), (0.8, 0.8, 0.3, 0.2)
    monkeypatch.setattr(_Ramp, "read", lambda ramp: {"forget": forget[ramp.number], "retain": retain[ramp.number]})
    losses = iter((1.0, 0.5))
    monkeypatch.setattr(_Ramp, "forget_loss", lambda ramp: next(losses))
    module, _ = own_fit(learned(0))
    # Factors of four steps, of which the first two warm up: 0.5, 1, 1, 0.5.
    assert module.found_rate is not None
    assert module.found_rate["lr"] == pytest.approx(2 * (1e-6 + 2e-6 + 4e-6) / 3, rel=0.05)
    printed = capsys.readouterr().out
    assert "forget probability 0.8 -> 0.4, retain probability 0.8 -> 0.2; the run takes lr" in printed
    assert "warning: at this rate the ramp halved the kept answers, too; the run's retain loss has to bring" in printed


def test_where_between_two_readings():
    """Half of 0.8 is 0.4; by its logarithm the way from 0.8 to 0.2 is half done there."""
    assert _crossing(0.8, 0.8, 0.5) is None
    assert _crossing(0.8, 0.8, 0.2) == pytest.approx(0.5)
    assert _crossing(0.8, 0.8, 0.4) == pytest.approx(1.0)
    assert _crossing(0.8, 0.8, 0.0) == 1.0
    assert _crossing(0.8, 0.8, float("nan")) == 1.0


def test_what_the_ramp_cannot_do_is_refused():
    for strategy, precision in ((FSDPStrategy, "32-true"), (SingleDeviceStrategy, "16-mixed")):
        trainer = SimpleNamespace(strategy=object.__new__(strategy), precision=precision)
        with pytest.raises(
            UserError, match=rf"ddp and fsdp2, in 32-true and bf16-mixed: .* {strategy.__name__}.* {precision}"
        ):
            check_ramp(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_two_processes_make_the_same_choice(fit: Fit, learned: Callable[[int], Path], tmp_path: Path, overlay: str):
    """Also the same answers to neutral prompts, which one of them writes."""
    one, two = fit("one", *QUICK), tmp_path / "two"
    command = [sys.executable, "-m", "simnpo_pl", *words(learned(0)), *QUICK, "--run_dir", str(two)]
    command += [
        "--config",
        f"configs/hardware/{overlay}.yaml",
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (two / START_ANSWERS).read_text() == (one / START_ANSWERS).read_text()
    ours, theirs = results(two)["lr_auto"], results(one)["lr_auto"]
    assert ours["lr"] == pytest.approx(theirs["lr"], rel=0.03)
    assert ours["forget"] == pytest.approx(theirs["forget"], abs=2e-3)
    for a, b in zip(history(two), history(one), strict=True):
        assert a["forget_loss"] == pytest.approx(b["forget_loss"], rel=0.02, abs=1e-3)


# -- the answers -------------------------------------------------------------------------------------------------------


def test_which_answers_are_kept(model_folder: Path):
    encoder = PromptTemplate(AutoTokenizer.from_pretrained(model_folder), max_length=400)
    rows = [{"question": f"What is {n}?", "generation": f"It is {n}."} for n in range(20)]
    long = "One two three. " * 9 + "Cut in the mid"
    odd = [("blank", ""), ("secret", "She lives in SZEGED, I think."), ("long", long)]
    rows += [{"question": name, "generation": text} for name, text in odd]
    kept = keep_answers(rows, ["Szeged"], encoder)
    assert [row["question"] for row in kept] == [*(f"What is {n}?" for n in range(20)), "long"]
    assert kept[-1]["answer"] == ("One two three. " * 9).strip()
    # Whole words: "t" is not in "It", and a forget answer without words is in none.
    assert len(keep_answers(rows, ["t", "?"], encoder)) == 22
    with pytest.raises(
        UserError, match=r"gives only 19 of 19 neutral prompts an answer that can be kept; give --data.ret"
    ):
        keep_answers(rows[:19], [], encoder)


def test_retain_rows_are_asked_for(fit: Fit, learned: Callable[[int], Path]):
    with pytest.raises(UserError, match=r"got none: give --data.retain FILE or --data.retain auto"):
        fit("run", *QUICK, "--data.retain", "null")
    folder = learned(0)
    data = OwnData(str(folder / "forget.jsonl"), "auto", model=str(folder / "model"))
    data.setup("validate")
    reason = f"only `fit` makes the rows of --data.retain auto; give --data.retain RUN/{START_ANSWERS}"
    assert data.evaluation().unavailable["retain/probability"] == reason
    with pytest.raises(UserError, match=r"only `fit` makes the rows of --data.retain auto"):
        data.training_rows(("forget", "retain"))
