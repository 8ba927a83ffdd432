"""The LightningModule: exact averages over the effective batch, the reference's place, what stops a run."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from simnpo_pl.benchmarks import TofuData
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.models.layers import compile_layers
from simnpo_pl.models.loading import load_causal_lm
from simnpo_pl.models.lora import LoraOptions
from simnpo_pl.module.optimization import schedule
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.module.updates import SAM
from simnpo_pl.objectives import (
    CEU,
    DPO,
    IDK,
    NPO,
    PDU,
    RKLD,
    RMU,
    UNDIAL,
    WGA,
    FineTune,
    ForgetInputs,
    GradAscent,
    GradDiff,
    NPORawLogits,
    Objective,
    SimNPO,
)
from simnpo_pl.objectives.retain import KL, NLL, EmbedDiff, RetainLoss
from simnpo_pl.utils.errors import UserError


class Losses(pl.Callback):
    """Keeps the logged losses of every optimizer step, and the frozen models as the last step left them.

    `holds_gradients` says for every micro-batch whether gradients were there after it.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.holds_gradients: list[bool] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.holds_gradients.append(any(p.grad is not None for p in pl_module.policy.parameters()))
        if trainer.global_step > len(self.steps):
            names = ("train/loss", "train/forget_loss", "train/retain_loss")
            self.steps.append({name: trainer.callback_metrics[name].item() for name in names})

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        frozen = (pl_module._reference, pl_module._memorizing)
        pl_module.residents = [model and model._resident for model in frozen]


@pytest.fixture
def fit(data_folder: Path, model_folder: Path, other_folder: Path) -> Callable[..., Any]:
    """Trains the tiny model for two epochs of 10 rows; gives module, losses and trainer."""

    def run(
        objective: Objective, retain_loss: RetainLoss | None = None, per_device: int = 4, epochs: int = 2, **kw: Any
    ):
        data = TofuData(
            path=str(data_folder),
            model=str(model_folder),
            effective_batch=4,
            per_device_batch=per_device,
            seed=3,
            eval=EvalOptions(max_new_tokens=3),
        )
        name = kw.pop("name", str(model_folder))
        precision = kw.pop("precision", "32-true")
        module = UnlearningModule(name, objective=objective, retain_loss=retain_loss or NLL(), lr=1e-2, **kw)
        losses = Losses()
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[losses],
        )
        trainer.fit(module, data)
        return module, losses.steps, trainer

    return run


def weights(module: UnlearningModule) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


@pytest.mark.parametrize("objective", [SimNPO, NPO, DPO, IDK, GradDiff, FineTune, WGA, CEU, UNDIAL, PDU, NPORawLogits])
def test_effective_batch_may_be_cut_any_way(fit: Callable[..., Any], objective: type[Objective]):
    """4 rows at once, 2 + 2 or 1 + 1 + 1 + 1: the same losses and the same trained weights (10 rows: 4, 4, 2)."""
    whole, whole_steps, _ = fit(objective(), per_device=4)
    assert len(whole_steps) == 6
    for per_device in (2, 1):
        cut, cut_steps, trainer = fit(objective(), per_device=per_device)
        assert trainer.accumulate_grad_batches == 4 // per_device
        for one, other in zip(whole_steps, cut_steps, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
        assert (weights(cut) - weights(whole)).norm() < 2e-3 * (weights(whole)).norm()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_gradients_are_held_during_a_forward_pass(fit: Callable[..., Any], precision: str):
    """Only those of earlier micro-batches of the same step: an epoch has 2 + 2, 2 + 2 and 2 rows."""
    _, _, trainer = fit(SimNPO(), per_device=2, precision=precision)
    (losses,) = (callback for callback in trainer.callbacks if isinstance(callback, Losses))
    assert losses.holds_gradients == [True, False, True, False, False] * 2


def test_kl_retain_with_cut_batches(fit: Callable[..., Any], other_folder: Path):
    """Against another model, since a divergence of 0 has a gradient of rounding errors that Adam blows up."""
    _, steps, _ = fit(NPO(), KL(), per_device=4, reference=str(other_folder))
    _, cut_steps, _ = fit(NPO(), KL(), per_device=1, reference=str(other_folder))
    for one, other in zip(steps, cut_steps, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert steps[0]["train/retain_loss"] > 0.1


def test_rmu_with_cut_batches(fit: Callable[..., Any], other_folder: Path):
    settings = {"retain_loss": EmbedDiff(0), "reference": str(other_folder), "trainable": [".*layers.0.*"]}
    whole, steps, _ = fit(RMU(layer=1, coefficient=2.0), per_device=4, **settings)
    for per_device in (2, 1):
        cut, cut_steps, _ = fit(RMU(layer=1, coefficient=2.0), per_device=per_device, **settings)
        for one, other in zip(steps, cut_steps, strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        assert (weights(cut) - weights(whole)).norm() < 2e-3 * (weights(whole)).norm()
    assert steps[-1]["train/forget_loss"] < steps[0]["train/forget_loss"]
    assert steps[0]["train/retain_loss"] > 0.1


@pytest.mark.parametrize("start_is_reference", [True, False])
def test_rkld_with_cut_batches(
    fit: Callable[..., Any],
    model_folder: Path,
    other_folder: Path,
    make_model: Callable[..., Path],
    start_is_reference: bool,
):
    """The teacher's logits come from the two frozen models, which stay as they are and in no checkpoint."""
    memorizing = make_model(2)
    settings = {"memorizing": str(memorizing), "reference": None if start_is_reference else str(other_folder)}
    settings |= {"retain_weight": 0.0, "epochs": 4}
    _, steps, _ = fit(RKLD(alpha=5.0), per_device=4, **settings)
    module, cut_steps, _ = fit(RKLD(alpha=5.0), per_device=1, **settings)
    for one, other in zip(steps, cut_steps, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    losses = [step["train/forget_loss"] for step in steps]
    assert 0.01 < sum(losses[-3:]) < sum(losses[:3])
    from simnpo_pl.models.loading import load_causal_lm

    for held, name in zip(
        module.residents, (model_folder if start_is_reference else other_folder, memorizing), strict=True
    ):
        fresh = load_causal_lm(str(name))
        assert all(map(torch.equal, held.model.parameters(), fresh.parameters()))
    assert module._reference._resident is module._memorizing._resident is None
    assert all(name.startswith("policy.") for name in module.state_dict())


def test_rkld_asks_for_its_model(make_model: Callable[..., Path], model_folder: Path):
    with pytest.raises(UserError, match=r"--model.objective RKLD reads .* --model.memorizing FOLDER; fit --config"):
        UnlearningModule("x", objective=RKLD())
    module = UnlearningModule(str(model_folder), objective=RKLD(), memorizing=str(make_model(0, vocab_size=99)))
    module.configure_model()
    with pytest.raises(UserError, match=r"--model.memorizing: .* has 99 tokens in its vocabulary, the policy \d+"):
        module._memorizing_scorer()


def test_dual_variable_follows_the_effective_batch(fit: Callable[..., Any]):
    """By hand from the logged retain losses of whole effective batches, however these are cut."""
    duals = []
    for per_device in (4, 1):
        objective = PDU(eps=1.0, step=0.1, warmup_epochs=1)
        _, steps, _ = fit(objective, per_device=per_device, retain_weight=0.5)
        dual = 0.5
        for number, step in enumerate(steps):
            expected = step["train/forget_loss"] + dual * (step["train/retain_loss"] - 1.0)
            assert step["train/loss"] == pytest.approx(expected, rel=1e-5)
            if number >= 3:
                dual = max(0.0, dual + 0.1 * (step["train/retain_loss"] - 1.0))
        assert objective.dual == pytest.approx(dual, rel=1e-5)
        duals.append(dual)
    assert duals[0] > 0.6
    assert duals[0] == pytest.approx(duals[1], rel=1e-4)


def test_a_bound_needs_a_retain_loss():
    with pytest.raises(UserError, match=r"--model.objective PDU bounds the retain loss: name one, such as"):
        UnlearningModule("x", objective=PDU(), retain_loss=None)
    assert UnlearningModule("x", objective=PDU(), retain_weight=0.0).parts == ("forget", "retain")


def test_only_what_is_named_is_trained(fit: Callable[..., Any], model_folder: Path, tmp_path: Path):
    """The rest stays bit for bit, is in no optimizer, and yet in the saved model; after training it is free again."""
    from simnpo_pl.models.loading import load_causal_lm

    module, _, trainer = fit(SimNPO(beta=1.0), trainable=[r"model\.layers\.1\.mlp\..*", "model.norm.weight"])
    start = dict(load_causal_lm(str(model_folder)).named_parameters())
    moved = {n for n, p in module.policy.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")} | {"model.norm.weight"}
    in_optimizer = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for n, p in module.policy.named_parameters() if n in moved}
    assert all(p.requires_grad for p in module.policy.parameters())
    module.policy.save_pretrained(tmp_path)
    saved = load_causal_lm(str(tmp_path)).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in module.policy.state_dict().items())


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ([".*", "down_proj"], r"--model.trainable 'down_proj' matches no parameter; .* such as model.layers.0."),
        (["("], r"--model.trainable '\(' is no regular expression"),
    ],
)
def test_trainable_must_match(model_folder: Path, trainable: list[str], message: str):
    with pytest.raises(UserError, match=message):
        UnlearningModule(str(model_folder), trainable=trainable).configure_model()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_are_trained_by_either_name(make_model: Callable[..., Path], name: str):
    module = UnlearningModule(str(make_model(tie_word_embeddings=True)), trainable=[name, "model.norm.weight"])
    module.configure_model()
    trained = [n for n, weight in module.policy.named_parameters() if weight.requires_grad]
    assert trained == ["model.embed_tokens.weight", "model.norm.weight"]


def test_layer_must_be_there(model_folder: Path):
    for settings, option in (
        ({"objective": RMU()}, "objective"),
        ({"objective": RMU(1), "retain_loss": EmbedDiff(7)}, "retain_loss"),
    ):
        with pytest.raises(UserError, match=f"--model.{option}.layer 7: the model has layers 0 to 1; give one of"):
            UnlearningModule(str(model_folder), **settings).configure_model()


def test_kl_starts_at_zero(fit: Callable[..., Any]):
    _, steps, _ = fit(NPO(), KL())
    assert steps[0]["train/retain_loss"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["train/retain_loss"] > 1e-3


def test_logged_loss_is_that_of_plain_batch(fit: Callable[..., Any], model_folder: Path):
    """The first step's loss, by hand: `losses` on the whole effective batch with the start model."""
    _module, steps, trainer = fit(SimNPO(beta=1.0), per_device=2)
    sampler = trainer.datamodule.sampler
    sampler.set_epoch(0)
    first = next(iter(sampler))
    rows = trainer.datamodule._training
    from simnpo_pl.data.training import collate

    batch = {
        "forget": collate([rows["forget"][i] for i in first.step_forget]),
        "retain": collate([rows["retain"][i] for i in first.step_retain]),
    }
    fresh = UnlearningModule(str(model_folder), objective=SimNPO(beta=1.0), retain_loss=NLL())
    fresh.configure_model()
    losses = fresh.losses(batch)
    for name in ("loss", "forget_loss", "retain_loss"):
        assert steps[0][f"train/{name}"] == pytest.approx(losses[name].item(), rel=1e-5)


@pytest.mark.parametrize(
    ("objective", "retain_loss"), [(NPO(), NLL()), (DPO(), NLL()), (SimNPO(), KL()), (NPORawLogits(), NLL())]
)
def test_reference_is_in_no_checkpoint_and_no_optimizer(
    fit: Callable[..., Any], objective: Objective, retain_loss: RetainLoss, tmp_path: Path
):
    module, _, trainer = fit(objective, retain_loss)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"policy.{name}" for name in module.policy.state_dict()}
    trained = {id(p) for p in module.policy.parameters()}
    assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == trained
    assert (module.residents[0] is not None) is (isinstance(retain_loss, KL) or isinstance(objective, NPORawLogits))
    # It would take memory from the final evaluation.
    assert module._reference._resident is None
    assert bool(saved["reference_logps"]["totals"]) is ("reference" in objective.needs)


@pytest.mark.parametrize("objective", [NPO(beta=0.3), DPO(beta=0.3)])
def test_cached_reference_equals_resident(fit: Callable[..., Any], other_folder: Path, objective: Objective):
    """The cache holds what the reference model itself says of every row, also where it is another model."""
    module, _steps, trainer = fit(objective, reference=str(other_folder))
    data = trainer.datamodule
    batch = next(iter(data.train_dataloader()))
    module._reference.add_to(batch)
    for name in objective.needs - {"reference"}:
        cached = batch[name].pop("reference_logps")
        again = getattr(ForgetInputs(batch, {}, module._models(batch)), f"reference_{name}")
        torch.testing.assert_close(again, cached, rtol=1e-5, atol=1e-5)
    assert all(part.isfinite().all() for part in module._reference.totals.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_start_model_is_its_own_reference(fit: Callable[..., Any], precision: str):
    """NPO's first loss is (2 / beta) log 2: policy and reference agree, in the precision of the run."""
    _, steps, _ = fit(NPO(beta=0.5), epochs=1, precision=precision, per_device=1)
    assert steps[0]["train/forget_loss"] == pytest.approx(
        4 * 0.6931472, rel=1e-3 if precision == "bf16-mixed" else 1e-5
    )


def test_kl_reference_packs_like_the_policy(fit: Callable[..., Any]):
    module, _, _ = fit(SimNPO(), KL(), epochs=1)
    assert module._scorer().forward.way == "packed"
    assert module.residents[0].forward.way == "packed"


def test_reference_stays_as_it_was(fit: Callable[..., Any], other_folder: Path):
    from simnpo_pl.models.loading import load_causal_lm

    module, _, _ = fit(SimNPO(), KL(), reference=str(other_folder))
    fresh = load_causal_lm(str(other_folder))
    held = module.residents[0].model
    assert all(torch.equal(a, b) for a, b in zip(held.parameters(), fresh.parameters(), strict=True))
    assert not held.training
    assert not any(p.requires_grad for p in held.parameters())


def test_policy_trains_in_train_mode(fit: Callable[..., Any], make_model: Callable[..., Path]):
    """Dropout is on: transformers loads models in eval mode and Lightning leaves them so."""
    folder = make_model(0, attention_dropout=0.5)
    _, with_dropout, _ = fit(SimNPO(beta=1.0), name=str(folder))
    _, without, _ = fit(SimNPO(beta=1.0))
    assert with_dropout[0]["train/loss"] != pytest.approx(without[0]["train/loss"], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"lora": LoraOptions(rank=2), "retain_loss": KL()},
        {"retain_loss": EmbedDiff(0)},
        {"precision": "bf16-mixed"},
    ],
    ids=["plain", "checkpointing", "LoRA and KL", "states of a layer", "bf16"],
)
def test_compiled_layers_change_nothing(
    fit: Callable[..., Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """One graph serves all layers and all batches but those of which rows share a token; weights keep their names."""
    from torch._dynamo.utils import counters

    # Inductor takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    plain, steps, _ = fit(SimNPO(beta=1.0), **options)
    assert not counters["stats"]
    fused, fused_steps, _ = fit(SimNPO(beta=1.0), compile=True, **options)
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for one, other in zip(steps, fused_steps, strict=True):
        assert other == pytest.approx(one, rel=1e-3 if "precision" in options else 1e-5)


def test_compiled_layers_leave_evaluations_alone(model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Also that of gradients."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda plain, **options: lambda *args, **inputs: compiled.append(plain))
    model, ids = load_causal_lm(str(model_folder)), torch.tensor([[3, 4, 5]])
    expected = model(ids).logits
    compile_layers(model)
    assert torch.equal(model(ids).logits, expected)
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, expected)
    assert not compiled
    with pytest.raises(AttributeError):
        model(ids)
    assert compiled


def test_compiled_layers_and_a_graph_that_is_used_twice():
    with pytest.raises(UserError, match=r"--model.compile true"):
        UnlearningModule("model", update=SAM(), compile=True)


def test_gradient_checkpointing_changes_nothing(fit: Callable[..., Any]):
    _plain, steps, _ = fit(SimNPO(beta=1.0))
    saving, saving_steps, _ = fit(SimNPO(beta=1.0), gradient_checkpointing=True)
    assert saving.policy.is_gradient_checkpointing
    for one, other in zip(steps, saving_steps, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_objectives_move_the_policy_their_way(fit: Callable[..., Any]):
    """Forgetting lowers NPO's loss from its start at (2 / beta) log 2; fine-tuning lowers the cross-entropy."""

    def first_and_last_epoch(name: str, steps: list[dict[str, float]]) -> tuple[float, float]:
        values = [step[f"train/{name}"] for step in steps]
        return sum(values[:3]) / 3, sum(values[-3:]) / 3

    _, steps, _ = fit(NPO(beta=0.1), epochs=8)
    first, last = first_and_last_epoch("forget_loss", steps)
    assert last < 0.5 * first
    _, steps, _ = fit(FineTune(), epochs=12)
    first, last = first_and_last_epoch("forget_loss", steps)
    assert last < 0.8 * first


def test_parts_asked_for():
    assert UnlearningModule("x", objective=GradAscent()).parts == ("forget",)
    assert UnlearningModule("x", objective=IDK()).parts == ("forget", "alternate", "retain")
    assert UnlearningModule("x", objective=SimNPO(), retain_loss=None).parts == ("forget",)
    assert UnlearningModule("x", objective=NPO()).parts == ("forget", "retain")


class Broken(Objective):
    """An objective that divides by zero on one row."""

    def forward(self, inputs: ForgetInputs) -> torch.Tensor:
        return inputs.forget.mean / (inputs._batch["forget"]["index"] != 7)


class Reads(Objective):
    """Reads one input."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, inputs: ForgetInputs) -> torch.Tensor:
        getattr(inputs, self.name)
        return inputs.forget.mean


@pytest.mark.parametrize(
    ("name", "said"),
    [("states",) * 2, ("positions",) * 2, ("alternate",) * 2, ("reference_states", "the reference model")],
)
def test_what_is_read_must_be_named(fit: Callable[..., Any], name: str, said: str):
    with pytest.raises(UserError, match=f"the loss of the forget rows reads {said}, which its `needs` must name"):
        fit(Reads(name))


def test_unknown_needs_are_refused():
    objective, retain_loss = Reads("forget"), NLL()
    objective.needs = frozenset({"forget", "entropy"})
    with pytest.raises(UserError, match=r"objective Reads: `needs` names entropy; known are forget, .*: name those"):
        UnlearningModule("x", objective=objective)
    retain_loss.needs = frozenset({"forget"})
    with pytest.raises(UserError, match=r"retain_loss NLL: `needs` names forget; known are retain, states, "):
        UnlearningModule("x", retain_loss=retain_loss)


@pytest.mark.parametrize("per_device", [1, 2, 4])
def test_loss_that_is_not_finite_stops_and_names_the_rows(
    fit: Callable[..., Any], per_device: int, monkeypatch: pytest.MonkeyPatch
):
    """Of the micro-batch that it comes from, and before the step that it would spoil."""
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args, **kw: taken.append(1) or step(*args, **kw))
    with pytest.raises(UserError, match=r"loss is not finite at optimizer step \d+ .*'forget': ") as caught:
        fit(Broken(), per_device=per_device)
    number, rows = re.findall(r"step (\d+) .*'forget': \[([\d, ]+)\]", str(caught.value))[0]
    # A step begins with the closure that raises.
    assert len(taken) == int(number) + 1
    assert "7" in rows.split(", ")
    assert len(rows.split(", ")) <= per_device


@pytest.mark.parametrize(
    "option", ["forget_weight", "retain_weight", "lr", "weight_decay", "warmup_epochs", "warmup_steps"]
)
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_negative_settings_are_refused(option: str, value: float):
    with pytest.raises(UserError, match=f"--model.{option} must be a number of at least 0, got"):
        UnlearningModule("x", **{option: value})


def test_schedule():
    """4 steps up, then 6 down to 0: 1/4, 2/4, 3/4, 1, then 1, 5/6, ... 1/6."""
    factor = schedule("linear", 4, 10)
    assert [factor(step) for step in range(11)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6, 0]
    )
    assert schedule("linear", 0, 2)(0) == 1
    constant = schedule("constant", 2, 5)
    assert [constant(step) for step in range(5)] == [0.5, 1, 1, 1, 1]
    with pytest.raises(UserError, match=r"--model.schedule must be linear or constant, got 'cosine'"):
        UnlearningModule("x", schedule="cosine")
