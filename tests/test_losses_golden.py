"""Losses and gradient norms of public implementations on one model and batch, met through the public module."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import golden as read_golden
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import (
    CEU,
    DPO,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    GradAscent,
    GradDiff,
    NPORawLogits,
    SatImp,
    SimNPO,
    SimNPORawLogits,
)
from simnpo_pl.objectives.retain import KL, NLL, EmbedDiff, RetainLoss

GOLDEN = read_golden("losses.json")

# Case: objective, retain loss, forget weight, retain weight. Public KL averages over every position; a margin delta
# inside beta is gamma = beta * delta here.
CASES: dict[str, Any] = {
    "GradAscent": (GradAscent(), NLL(), None, None),
    "GradDiff_NLL": (GradDiff(), NLL(), None, None),
    "GradDiff_KL": (GradDiff(), KL("all"), None, None),
    "NPO_NLL": (NPO(), NLL(), None, None),
    "NPO_KL": (NPO(), KL("all"), None, None),
    "SimNPO_b4.5": (SimNPO(), NLL(), None, None),
    "SimNPO_b2.5": (SimNPO(2.5), NLL(), 0.1375, None),
    "SimNPO_b3.5_d1": (SimNPO(3.5, gamma=3.5 * 1.0), NLL(), 1.0, 0.5),
    "SimNPO_b4.5_KL": (SimNPO(), KL("all"), None, None),
    "DPO_NLL": (DPO(), NLL(), None, None),
    "WGA": (WGA(), NLL(), None, None),
    "SatImp": (SatImp(), NLL(), None, None),
    "CEU": (CEU(), NLL(), None, None),
    "PDU_warmup5": (PDU(0.3, average_over="labels"), NLL(), None, None),
    "PDU_warmup0": (PDU(0.3, warmup_epochs=0, average_over="labels"), NLL(), None, None),
}


def tensors(part: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in part.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_loss_and_gradient(golden_models: dict[str, Path], case: str, packed: bool):
    stored = copy.deepcopy(GOLDEN)
    golden = GOLDEN["losses"][case]
    objective, retain_loss, forget_weight, retain_weight = CASES[case]
    if "alternate" in objective.needs:
        both, retain = stored["dpo_batch"]["forget"], stored["dpo_batch"]["retain"]
        parts = {"forget": both["original"], "alternate": both["alternate"], "retain": retain}
    else:
        parts = {name: stored["batch"][name] for name in ("forget", "retain")}
    module = UnlearningModule(
        name=str(golden_models["policy"]),
        reference=str(golden_models["target"]),
        objective=objective,
        retain_loss=retain_loss,
        forget_weight=forget_weight,
        retain_weight=retain_weight,
        attn_implementation=None if packed else "eager",
    )
    module.configure_model()
    assert (module._scorer().forward.way == "packed") is packed
    losses = module.losses({name: tensors(part) for name, part in parts.items()})
    losses["loss"].backward()
    norm = torch.stack([p.grad.norm() for p in module.policy.parameters() if p.grad is not None]).norm()
    assert losses["loss"].item() == pytest.approx(golden["loss"], rel=1e-5)
    assert norm.item() == pytest.approx(golden["grad_norm"], rel=1e-5)
    if "forget_loss_unweighted" in golden:
        assert losses["forget_loss"].item() == pytest.approx(golden["forget_loss_unweighted"], rel=1e-5)
        assert losses["retain_loss"].item() == pytest.approx(golden["retain_loss_unweighted"], rel=1e-5)


def value_and_gradient_norm(module: UnlearningModule, batch: dict[str, Any]) -> tuple[float, float]:
    loss = module.losses({name: tensors(part) for name, part in batch.items()})["loss"]
    loss.backward()
    norms = [p.grad.norm() for p in module.policy.parameters() if p.grad is not None]
    return loss.item(), torch.stack(norms).norm().item()


@pytest.mark.parametrize("case", ["PDU_warmup0", "PDU_warmup5"])
def test_dual_variable_after_a_step(golden_models: dict[str, Path], case: str):
    golden = GOLDEN["losses"]
    objective = PDU(0.3, warmup_epochs=0 if case.endswith("0") else 5)
    objective.after_step(torch.tensor(golden["GradDiff_NLL"]["retain_loss_unweighted"]), 1.0, epoch=0)
    assert objective.dual == pytest.approx(golden[case]["preferences_after_call"][1], rel=1e-6)


@pytest.mark.parametrize(("case", "retain_loss"), [("RMU_EMBED_DIFF", EmbedDiff(1, "crossed")), ("RMU_NLL", NLL())])
def test_rmu(golden_models: dict[str, Path], case: str, retain_loss: RetainLoss):
    """Public code divides every row's sum by every row's length.

    The stored attention mask hides the last answer token, whose state counts; such a token runs only when padded.
    """
    golden = GOLDEN["losses"][case]
    objective = RMU(layer=1, coefficient=2.0, seed=0, average_over="crossed")
    vector = objective.coefficient * objective.direction(64)
    assert vector.tolist() == pytest.approx(golden["control_vec"], rel=1e-6)
    module = UnlearningModule(
        name=str(golden_models["policy"]),
        reference=str(golden_models["target"]),
        objective=objective,
        retain_loss=retain_loss,
        trainable=[".*"],
        attn_implementation="eager",
    )
    module.configure_model()
    batch = copy.deepcopy(GOLDEN)["batch"]
    losses = module.losses({name: tensors(part) for name, part in batch.items()})
    assert losses["forget_loss"].item() == pytest.approx(golden["forget_loss_unweighted"], rel=1e-5)
    assert losses["retain_loss"].item() == pytest.approx(golden["retain_loss_unweighted"], rel=1e-5)
    value, norm = value_and_gradient_norm(module, batch)
    assert value == pytest.approx(golden["loss"], rel=1e-5)
    assert norm == pytest.approx(golden["grad_norm"], rel=1e-5)


def test_rmu_packed_and_padded(golden_models: dict[str, Path]):
    """With every token in the attention mask, packed rows give what padded ones give."""
    batch = copy.deepcopy(GOLDEN)["batch"]
    for part in batch.values():
        for mask, labels in zip(part["attention_mask"], part["labels"], strict=True):
            mask[:] = [int(bool(m) or y != -100) for m, y in zip(mask, labels, strict=True)]
    found = []
    for attention in (None, "eager"):
        module = UnlearningModule(
            name=str(golden_models["policy"]),
            reference=str(golden_models["target"]),
            objective=RMU(layer=0, coefficient=2.0),
            retain_loss=EmbedDiff(layer=1),
            attn_implementation=attention,
        )
        module.configure_model()
        assert (module._scorer().forward.way == "packed") is (attention is None)
        found.append(value_and_gradient_norm(module, batch))
        trained = {name for name, p in module.policy.named_parameters() if p.grad is not None}
        assert trained == {"model.layers.0.mlp.down_proj.weight"}
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(
    ("kind", "delta"),
    [("npo", None), ("npo_gdr", None), *((kind, delta) for kind in ("simnpo", "simnpo_gdr") for delta in (0.0, 0.1))],
)
def test_raw_logits_of_public_muse_code(golden_models: dict[str, Path], kind: str, delta: float | None, beta: float):
    golden = GOLDEN["muse"]
    wanted = {"loss_type": kind, "beta": beta, **({} if delta is None else {"gamma": delta})}
    case = next(c for c in golden["repository"] if wanted.items() <= c.items())
    module = UnlearningModule(
        name=str(golden_models["target"]),
        reference=str(golden_models["retain"]),
        objective=NPORawLogits(beta) if delta is None else SimNPORawLogits(beta, delta),
        forget_weight=case.get("npo_coeff"),
        retain_weight=case.get("coeff", 1.0) if kind.endswith("gdr") else 0.0,
    )
    module.configure_model()
    batch = {}
    for side in ("forget", "retain"):
        ids = golden["batch"][f"{side}_input_ids"]
        batch[side] = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]}
    value, norm = value_and_gradient_norm(module, batch)
    assert value == pytest.approx(case["value"], rel=1e-5)
    assert norm == pytest.approx(case["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_summed_log_probs(golden_models: dict[str, Path], side: str):
    stored = copy.deepcopy(GOLDEN)["batch"][side]
    golden = GOLDEN["summed_nll_per_sequence"]["policy"][side]
    module = UnlearningModule(name=str(golden_models["policy"]))
    module.configure_model()
    total = module._scorer()({"rows": tensors(stored)})["rows"].logps().total
    assert (-total).tolist() == pytest.approx(golden, rel=1e-5)


def test_kl_over_answers_differs_from_kl_over_all(golden_models: dict[str, Path]):
    """The default leaves out questions and padding, by hand from full logits."""
    stored = copy.deepcopy(GOLDEN)["batch"]
    batch = {name: tensors(part) for name, part in stored.items()}
    settings = {
        "name": str(golden_models["policy"]),
        "reference": str(golden_models["target"]),
        "objective": GradDiff(),
    }
    module = UnlearningModule(**settings, retain_loss=KL())
    module.configure_model()
    loss = module.losses(batch)["retain_loss"].item()

    retain = batch["retain"]
    log_p, log_q = (
        scorer.all_logits(retain)[:, :-1].log_softmax(-1) for scorer in (module._reference_scorer(), module._scorer())
    )
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[retain["labels"][:, 1:] != -100]
    assert loss == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert loss != pytest.approx(0.5775297284126282, rel=1e-2)


def test_undial_over_answer_tokens(golden_models: dict[str, Path]):
    """Public code averages over prompt and padding; over the answers' tokens alone its value is 4.744792."""
    stored = copy.deepcopy(GOLDEN)["batch"]
    module = UnlearningModule(
        name=str(golden_models["policy"]), reference=str(golden_models["target"]), objective=UNDIAL()
    )
    module.configure_model()
    losses = module.losses({name: tensors(part) for name, part in stored.items()})
    assert losses["loss"].item() == pytest.approx(4.744792, rel=1e-6)
