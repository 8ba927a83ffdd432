"""Checks of an accelerator: README's commands and the losses of a step; of a GPU, and of the second device."""

import copy
import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from helpers import history, results
from simnpo_pl import objectives
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.logprobs import Scorer
from simnpo_pl.objectives import Models, Objective
from simnpo_pl.objectives.base import batch_losses
from simnpo_pl.objectives.retain import JSD, KL, NLL, EmbedDiff

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, dict[str, Any]] = {"RMU": {"layer": 0}, "PDU": {"eps": 0.5}}
NAMES = [n for n, c in vars(objectives).items() if isinstance(c, type) and issubclass(c, Objective) and c != Objective]
RETAIN = {
    "NLL": NLL,
    "KL": KL,
    "KL over all": lambda: KL("all"),
    "JSD": JSD,
    "EmbedDiff": lambda: EmbedDiff(0),
    "none": lambda: None,
}
PRECISIONS = {"float32": (5e-5, 1e-3), "bfloat16": (3e-2, 5e-2)}
"""Largest relative difference of the loss and of the gradient's norm from float32 on a CPU."""


class StopAt(Callback):
    """Sends the run the signal of a scheduler: after a training step, or after a batch of an evaluation."""

    def __init__(self, step: int = 0, batch: int = -1) -> None:
        self.step, self.batch = step, batch

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_test_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


def rows(count: int, vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """Right-padded rows of unlike lengths, of which the first two begin alike."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (count, 14), generator=draw)
    ids[1, :5] = ids[0, :5]
    mask = torch.ones_like(ids)
    mask[0, 11:] = mask[2, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "index": torch.arange(count)}


class Step:
    """Loss and gradient norm of one batch.

    Args:
        folders: Policy, reference and memorizing model, of one tokenizer.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.models = [load_causal_lm(str(folder)).train() for folder in folders]
        self.batch = {name: rows(4, 100, n) for n, name in enumerate(("forget", "retain", "alternate", "sampled"))}
        self.cpu = torch.device("cpu")
        self.scorers = {self.cpu: [Scorer(model) for model in self.models]}

    def __call__(self, objective: Objective, retain: str, device: torch.device, low: bool = False) -> list[float]:
        """Forget loss, retain loss and the norm of the gradient."""
        if device not in self.scorers:
            self.scorers[device] = [Scorer(copy.deepcopy(model).to(device)) for model in self.models]
        policy, reference, memorizing = self.scorers[device]
        assert policy.forward.way == "packed"
        batch = {name: {key: value.to(device) for key, value in part.items()} for name, part in self.batch.items()}
        policy.model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            models = Models(policy, reference, memorizing)
            forget, kept, _ = batch_losses(objective, RETAIN[retain](), batch, models)
        objective.total(forget, kept, 1.0, objective.default_retain_weight or 1.0).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        return [forget.item(), kept.item(), norm.item()]

    def differences(
        self, device: torch.device, name: str, precisions: Mapping[str, tuple[float, float]] = PRECISIONS
    ) -> list[str]:
        """Where an objective, under every retain loss and in both precisions, is not what it is on the CPU."""
        objective = getattr(objectives, name)(**SETTINGS.get(name, {}))
        wrong = []
        for retain in RETAIN:
            if retain == "none" and objective.needs_retain:
                continue
            expected = self(objective, retain, self.cpu)
            for precision, (loss, norm) in precisions.items():
                found = self(objective, retain, device, low=precision == "bfloat16")
                for got, want, tolerance in zip(found, expected, (loss, loss, norm), strict=True):
                    # Written so that a value that is not a number differs, too.
                    if not abs(got - want) <= tolerance * abs(want) + 1e-5:
                        wrong.append(f"{retain}, {precision}: {got} and not {want}")
        return wrong


class DeviceChecks:
    """README's commands, as a user of a GPU gives them: in the precision that the command line chooses, and clipped.

    Subclasses say where, and how large the model is.
    """

    shape: ClassVar[dict[str, Any]] = {}
    """Of the model, where it differs from the tiny one of all tests."""
    device_type: ClassVar[str]
    run: ClassVar[Callable[..., tuple[int, str]]]
    """Runs the command line in a process of its own: exit code and what was printed."""

    @classmethod
    def call(cls, *arguments: Any, code: int = 0) -> str:
        found, text = cls.run([str(word) for word in arguments])
        assert found == code, text
        return text

    @pytest.fixture(scope="class")
    @classmethod
    def common(
        cls, make_model: Callable[..., Path], data_folder: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> list[str]:
        """Local files in place of the hub's."""
        model, cache = make_model(0, **cls.shape), tmp_path_factory.mktemp("cache")
        return [
            *("--config", str(ROOT / "configs/tofu.yaml"), "--data.path", str(data_folder), "--model.name", str(model)),
            *("--eval.cache_dir", str(cache), "--data.effective_batch", "4", "--data.per_device_batch", "2"),
            *("--model.lr", "1e-3", "--trainer.max_epochs", "1"),
            *("--trainer.enable_progress_bar", "false", "--eval.max_new_tokens", "5"),
        ]

    @pytest.fixture(scope="class")
    @classmethod
    def fitted(cls, common: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
        """A finished run, and what it printed."""
        folder = tmp_path_factory.mktemp("fit") / "run"
        return folder, cls.call("fit", *common, "--run_dir", folder)

    def test_fit(self, fitted: tuple[Path, str]):
        folder, text = fitted
        assert f"{self.device_type}:0, precision bf16-mixed" in text, text
        record = results(folder)
        assert record["finished"]
        assert record["final"]["metrics"] != record["start"]["metrics"]
        steps = history(folder)
        assert len(steps) == 3
        assert all(math.isfinite(value) for step in steps for value in step.values())
        assert (folder / "model" / "model.safetensors").is_file()

    def test_exported_model_gives_the_run_s_metrics(self, fitted: tuple[Path, str], common: list[str], tmp_path: Path):
        folder, _ = fitted
        self.call("test", *common, "--model.name", folder / "model", "--run_dir", tmp_path / "run")
        found, expected = (results(f)["final"]["metrics"] for f in (tmp_path / "run", folder))
        assert found == pytest.approx(expected, rel=1e-2, abs=1e-3, nan_ok=True)

    def test_answers(self, fitted: tuple[Path, str], common: list[str], tmp_path: Path):
        self.call("predict", *common, "--model.name", fitted[0] / "model", "--run_dir", tmp_path / "run")
        assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 25

    def test_attacks_and_report(self, fitted: tuple[Path, str], tmp_path: Path):
        folder = fitted[0]
        self.call("relearn", folder, "--epochs", "1", "--repeats", "1")
        self.call("quantize", folder)
        self.call("leak", folder, "--k", "2")
        self.call("report", folder, "-o", tmp_path / "report.html", tmp_path / "report.md")
        assert {"relearn", "quantized", "leak"} <= results(folder).keys()

    def test_resume_in_mid_epoch(self, fitted: tuple[Path, str], common: list[str], tmp_path: Path):
        folder = tmp_path / "run"
        stop = ["--trainer.callbacks", "device_checks.StopAt", "--trainer.callbacks.step", "2"]
        text = self.call("fit", *common, "--run_dir", folder, *stop, code=143)
        assert "--ckpt_path last" in text
        self.call("fit", *common, "--run_dir", folder, "--ckpt_path", "last")
        found, expected = ([step["loss"] for step in history(f)] for f in (folder, fitted[0]))
        assert found == pytest.approx(expected, rel=2e-2)

    def test_interrupted_evaluation(self, fitted: tuple[Path, str], common: list[str], tmp_path: Path):
        """Finished batches are read back from the disk."""
        folder = tmp_path / "run"
        words = ["test", *common, "--eval.tokens_per_batch", "512", "--eval.prompts_per_batch", "8"]
        words += ["--run_dir", folder]
        self.call(*words, "--trainer.callbacks", "device_checks.StopAt", "--trainer.callbacks.batch", "2", code=143)
        kept = [line for file in (folder / ".evaluation").glob("*/*.jsonl") for line in file.read_text().splitlines()]
        assert len(kept) == 3
        self.call(*words)
        expected = results(fitted[0])["start"]["metrics"]
        assert results(folder)["final"]["metrics"] == pytest.approx(expected, rel=1e-2, abs=1e-3, nan_ok=True)

    @pytest.mark.parametrize(
        "options",
        [
            ["--model.lora.rank", "4", "--model.objective", "NPO", "--model.retain_loss", "KL"],
            [
                *("--config", str(ROOT / "configs/hardware/checkpointing.yaml"), "--model.objective", "DPO"),
                *("--data.holdout", "retain90[:6]", "--eval.gradnorm", "true"),
            ],
            [
                "--model.objective",
                "RMU",
                "--model.objective.layer",
                "1",
                "--model.retain_loss",
                "EmbedDiff",
                "--model.retain_loss.layer",
                "1",
            ],
        ],
        ids=["adapter", "checkpointing and gradient norms", "layers"],
    )
    def test_other_methods(self, common: list[str], tmp_path: Path, options: list[str]):
        folder = tmp_path / "run"
        self.call("fit", *common, *options, "--eval.start", "false", "--run_dir", folder)
        assert results(folder)["finished"]
        assert all(math.isfinite(value) for step in history(folder) for value in step.values())
        assert json.loads((folder / "model" / "config.json").read_text())["model_type"] == "llama"
