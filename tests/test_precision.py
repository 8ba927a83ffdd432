"""The training path in every precision: whole runs, clipping, and every objective with every retain loss."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from transformers import AutoTokenizer

import simnpo_pl.objectives as objectives
from helpers import history, results
from simnpo_pl.__main__ import main
from simnpo_pl.benchmarks import TofuData
from simnpo_pl.data.training import Batch
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import NPO, PDU, RKLD, RMU, Objective, SimNPO
from simnpo_pl.objectives.retain import KL, NLL, EmbedDiff, RetainLoss
from simnpo_pl.utils.errors import UserError

CLI = Callable[..., None]
BF16 = ("--config", str(Path(__file__).parents[1] / "configs" / "hardware" / "bf16.yaml"))
QUICK = ("--eval.start", "false", "--eval.final", "false", "--trainer.check_val_every_n_epoch", "100")
LORA = ("--model.lora.rank", "4", "--model.gradient_checkpointing", "true")
RMU_OPTIONS = (
    *("--model.objective", "RMU", "--model.objective.layer", "1", "--model.retain_loss", "EmbedDiff"),
    *("--model.retain_loss.layer", "1"),
)


class Clipping:
    """Gradients of every optimizer step, before and after they are clipped."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []
        logs, step = UnlearningModule.on_before_optimizer_step, torch.optim.AdamW.step

        def before(module: Any, optimizer: Any) -> None:
            self.before.append(self.gradient(optimizer))
            logs(module, optimizer)

        def after(optimizer: Any, closure: Any = None) -> Any:
            # Lightning makes the gradients in the closure where no scaler is at work.
            if closure is not None:
                closure()
            self.after.append(self.gradient(optimizer))
            return step(optimizer)

        patch.setattr(UnlearningModule, "on_before_optimizer_step", before)
        patch.setattr(torch.optim.AdamW, "step", after)

    @staticmethod
    def gradient(optimizer: Any) -> torch.Tensor:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        assert all(grad.dtype == torch.float32 for grad in grads)
        return torch.cat([grad.flatten() for grad in grads])

    def check(self, limit: float) -> None:
        """Each step's gradient is what float32 clipping makes of it, and clipping had something to do."""
        assert len(self.before) == len(self.after) > 0
        for before, after in zip(self.before, self.after, strict=True):
            norm = before.double().norm().item()
            assert after.double().norm().item() <= limit * (1 + 1e-5)
            torch.testing.assert_close(after, before * min(1.0, limit / norm), rtol=1e-4, atol=1e-7)
        assert max(before.norm().item() for before in self.before) > limit


@pytest.fixture
def clipping(monkeypatch: pytest.MonkeyPatch) -> Clipping:
    return Clipping(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [(), ("--model.objective", "NPO", "--model.retain_loss", "KL", *LORA), RMU_OPTIONS],
    ids=["all weights", "LoRA", "RMU"],
)
def test_a_run_clips_and_ends(
    cli: CLI, clipping: Clipping, model_folder: Path, tmp_path: Path, options: tuple[str, ...]
):
    """In bf16-mixed: gradients are clipped as in float32, the first step's losses are float32's to within bfloat16."""
    found = []
    for number, precision in enumerate(((), BF16)):
        folder = tmp_path / str(number)
        clip = ("--trainer.gradient_clip_val", "0.1")
        cli("fit", *QUICK, *options, *precision, *clip, "--trainer.max_epochs", "1", "--run_dir", str(folder))
        assert results(folder)["finished"]
        found.append(history(folder))
    clipping.check(0.1)
    if "--model.lora.rank" in options:
        assert results(folder)["settings"]["model"]["gradient_checkpointing"]
    models = (load_causal_lm(str(name)) for name in (model_folder, folder / "model"))
    start, trained = (model.model.layers[1].mlp.down_proj.weight for model in models)
    assert not torch.equal(start, trained)
    assert len(found[1]) == 3
    for name in ("loss", "forget_loss", "retain_loss"):
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=2e-2, abs=1e-3)


@pytest.fixture(scope="module")
def bf16_run(run_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "bf16"
    few = ("--trainer.max_epochs", "1", "--eval.splits", "[forget]", "--eval.generate_rows", "2")
    main(["fit", *run_options, *BF16, *few, "--eval.start", "false", "--run_dir", str(folder), "--debug"])
    return folder


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (("relearn", "--share", "0.3", "--epochs", "1"), "relearn"),
        (("quantize",), "quantized"),
        (("leak", "--k", "2"), "leak"),
    ],
)
def test_what_is_done_to_a_run_afterwards(bf16_run: Path, command: tuple[str, ...], key: str):
    main([command[0], str(bf16_run), *command[1:], "--debug"])
    assert results(bf16_run)[key]


def test_test_of_an_exported_model(cli: CLI, bf16_run: Path, tmp_path: Path):
    """The numbers of the run's own end."""
    few = ("--eval.splits", "[forget]", "--eval.generate_rows", "2")
    cli("test", *BF16, *few, "--model.name", str(bf16_run / "model"), "--run_dir", str(tmp_path / "run"))
    assert results(tmp_path / "run")["final"] == results(bf16_run)["final"]


def test_the_lines_of_the_readme(
    data_folder: Path,
    model_folder: Path,
    clipping: Clipping,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    changed = "'max_epochs': 1, 'gradient_clip_val': 0.1, 'accelerator': 'cpu', 'precision': 'bf16-mixed'"
    for old, new in (
        ("runs/demo-data/start", str(model_folder)),
        ("runs/demo-data", str(data_folder)),
        ("**TRAINER_DEFAULTS", f"**(TRAINER_DEFAULTS | {{{changed}}})"),
        ("check_val_every_n_epoch=10", "check_val_every_n_epoch=1"),
    ):
        assert old in lines
        lines = lines.replace(old, new)
    monkeypatch.setattr("simnpo_pl.benchmarks.demo.prepare", lambda folder, seed: None)
    monkeypatch.chdir(tmp_path)
    try:
        with warnings.catch_warnings():
            exec(lines, {})
    finally:
        logging.disable(logging.NOTSET)
    clipping.check(0.1)
    load_causal_lm(str(tmp_path / "runs" / "unlearned"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "runs" / "unlearned")) > 0
    shown = capsys.readouterr()
    assert re.fullmatch(r"forget/probability 0\.\d+\nretain/probability 0\.\d+\n", shown.out)
    assert shown.err == ""


# -- the Trainer on one tiny layer -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(make_model: Callable[..., Path]) -> Path:
    return make_model(0, num_hidden_layers=1, hidden_size=16, intermediate_size=16)


@pytest.fixture(scope="module")
def others(make_model: Callable[..., Path]) -> dict[str, str]:
    """A reference and a memorizing model."""
    settings = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    return {name: str(make_model(seed, **settings)) for seed, name in enumerate(("reference", "memorizing"), start=1)}


def trainer(**settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=0.1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )


def tofu(data_folder: Path, model: Path, batch: int = 8) -> TofuData:
    options = EvalOptions(max_new_tokens=3, generate_rows=2)
    sizes = {"effective_batch": batch, "per_device_batch": batch}
    return TofuData(path=str(data_folder), model=str(model), eval=options, **sizes)


class BFloat16Steps(Precision):
    """As FSDP has it in bf16-mixed: new tensors of a step are bfloat16 unless they say otherwise."""

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("objective", "retain_loss"),
    [(SimNPO(beta=1.0), NLL()), (NPO(), KL()), (RMU(layer=0), EmbedDiff(0)), (RKLD(), NLL())],
    ids=lambda part: type(part).__name__,
)
def test_trainer_in_mixed_precision(
    data_folder: Path,
    small: Path,
    others: dict[str, str],
    clipping: Clipping,
    objective: Objective,
    retain_loss: RetainLoss,
):
    """bf16-mixed, and float16 with its scaler of gradients, which are clipped after they are scaled back."""
    # A larger scale overflows in the first step, which the scaler then skips.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    plugins = MixedPrecision("bf16-mixed", "cpu"), MixedPrecision("16-mixed", "cpu", scaler)
    for number, plugin in enumerate(plugins):
        module = UnlearningModule(str(small), objective=objective, retain_loss=retain_loss, lr=1e-2, **others)
        trained = trainer(plugins=[plugin])
        trained.fit(module, tofu(data_folder, small))
        assert trained.precision == ("bf16-mixed", "16-mixed")[number]
        assert (plugin.scaler is not None) is (number == 1)
        assert all(p.isfinite().all() for p in module.policy.parameters())
    clipping.check(0.1)


@pytest.mark.parametrize(("objective", "retain_loss"), [(NPO(), KL()), (RMU(layer=0), EmbedDiff(0))])
def test_no_result_depends_on_the_default_type(
    data_folder: Path, small: Path, others: dict[str, str], objective: Objective, retain_loss: RetainLoss
):
    """Float32 weights in steps whose default type is bfloat16: reference, losses and evaluation bit for bit."""
    found = []
    for settings in ({"precision": "32-true"}, {"plugins": [BFloat16Steps()]}):
        module = UnlearningModule(str(small), objective=objective, retain_loss=retain_loss, lr=1e-2, **others)
        trained, data = trainer(**settings), tofu(data_folder, small)
        trained.fit(module, data)
        trained.test(module, datamodule=data, verbose=False)
        assert module.evaluation_result is not None
        found.append((module.evaluation_result, trained.logged_metrics, module._reference.totals))
    (plain, logged, totals), (other, other_logged, other_totals) = found
    assert plain.values == pytest.approx(other.values, nan_ok=True, rel=0, abs=0)
    assert plain.rows == other.rows
    assert {n: v.item() for n, v in logged.items()} == {n: v.item() for n, v in other_logged.items()}
    assert all(torch.equal(totals[name], other_totals[name]) for name in totals)


# -- every objective with every retain loss --------------------------------------------------------------------


def every_objective() -> list[Objective]:
    found = [getattr(objectives, name) for name in objectives.__all__]
    kinds = [kind for kind in found if isinstance(kind, type) and issubclass(kind, Objective) and kind is not Objective]
    assert len(kinds) >= 18
    made = [kind(layer=0) if kind is RMU else kind() for kind in kinds]
    return [*made, RMU(layer=0, average_over="crossed"), PDU(average_over="labels")]


RETAIN_LOSSES = (None, NLL(), KL(), KL("all"), EmbedDiff(0), EmbedDiff(0, "crossed"))


@pytest.fixture(scope="module")
def rows(data_folder: Path, small: Path) -> Batch:
    data = tofu(data_folder, small, batch=2)
    data.trainer = trainer()
    data.load_training(("forget", "retain", "alternate"))
    batch = next(iter(data.train_dataloader()))
    # In place of the start model's own samples.
    return {**batch, "sampled": batch["alternate"]}


@pytest.fixture(scope="module")
def frozen(small: Path, others: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Policy, reference and memorizing model by type of weights, loaded once for all cases."""
    names = {"policy": str(small), **others}
    return {d: {n: load_causal_lm(m, d) for n, m in names.items()} for d in ("float32", "bfloat16")}


def step(models: dict[str, Any], precision: Any, batch: Batch, *parts: Any) -> tuple[list[float], torch.Tensor]:
    """Losses and gradient of one step with the models that were loaded before."""
    from simnpo_pl.models.logprobs import Scorer

    module = UnlearningModule("policy", *parts, reference="reference", memorizing="memorizing")
    module.policy = models["policy"].train()
    module._reference._resident = Scorer(models["reference"])
    assert module._memorizing is not None
    module._memorizing._resident = Scorer(models["memorizing"])
    module.policy.zero_grad()
    with precision.train_step_context():
        losses = module.losses(batch)
    losses["loss"].backward()
    grads = [p.grad.flatten().float() for p in module.policy.parameters() if p.grad is not None]
    return [losses[name].item() for name in ("loss", "forget_loss", "retain_loss")], torch.cat(grads)


@pytest.mark.parametrize("objective", every_objective(), ids=lambda objective: type(objective).__name__)
def test_every_objective_with_every_retain_loss(objective: Objective, rows: Batch, frozen: dict[str, dict[str, Any]]):
    """Finite in every precision, and float32's to within bfloat16: autocast, bfloat16 weights, a bfloat16 default."""
    for retain_loss in RETAIN_LOSSES:
        if retain_loss is None and objective.needs_retain:
            continue
        expected, gradient = step(frozen["float32"], Precision(), rows, objective, retain_loss)
        same, same_gradient = step(frozen["float32"], BFloat16Steps(), rows, objective, retain_loss)
        assert same == expected
        assert torch.equal(same_gradient, gradient)
        for dtype, precision in (("float32", MixedPrecision("bf16-mixed", "cpu")), ("bfloat16", Precision())):
            found, other = step(frozen[dtype], precision, rows, objective, retain_loss)
            assert found == pytest.approx(expected, rel=5e-2, abs=5e-3), (dtype, retain_loss)
            assert other.isfinite().all()
            # PDU's largest logit is now and then another token's.
            assert (other - gradient).norm() <= 0.2 * gradient.norm(), (dtype, retain_loss)


# -- what is refused, and what is meant ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["64-true", "16-true", "bf16-true"])
def test_casts_of_the_whole_model_are_refused(data_folder: Path, small: Path, precision: str):
    refused = f"--trainer.precision {precision} is not supported: give 32-true, bf16-mixed or 16-mixed; for weights in"
    with pytest.raises(UserError, match=refused):
        trainer(precision=precision).fit(UnlearningModule(str(small)), tofu(data_folder, small))


def test_bfloat16_weights(cli: CLI, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """`bf16-true` loads them so, with RoPE's frequencies exact and a word on what is lost."""
    seen: list[Any] = []
    monkeypatch.setattr(UnlearningModule, "on_train_end", lambda module: seen.append(module), raising=False)
    options = ("--trainer.precision", "bf16-true", "--model.objective", "NPO", "--trainer.max_epochs", "1")
    with pytest.warns(UserWarning, match=r"--model.dtype bfloat16: updates smaller than 1/256 of a weight are lost"):
        cli("fit", *QUICK, *options, "--run_dir", str(tmp_path / "run"))
    (module,) = seen
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
    exact = load_causal_lm(str(model_folder)).model.rotary_emb.inv_freq
    assert torch.equal(module.policy.model.rotary_emb.inv_freq, exact)
    assert not torch.equal(exact, exact.bfloat16().float())
    assert module._reference.totals["forget"].dtype == torch.float32
    first = history(tmp_path / "run")[0]
    # NPO's first loss is (2 / beta) log 2, since the policy is its own reference.
    assert first["forget_loss"] == pytest.approx(20 * 0.6931472, rel=1e-2)
