"""Losses, gradients and steps of newer public implementations on one model and batch; see tests/goldens/README.md."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from helpers import golden as read_golden
from simnpo_pl.module import GRU, SAM, UpdateRule
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import IHL, NPO, AltPO, GradAscent, JensUn, Objective, SimNPO
from simnpo_pl.objectives.retain import JSD, NLL, RetainLoss

GOLDEN = read_golden("newer.json.gz")
BATCH = read_golden("losses.json")["batch"]
Part = dict[str, torch.Tensor]


def part(values: dict[str, Any], rows: list[int] | slice = slice(None)) -> Part:
    return {key: torch.tensor(value).long()[rows] for key, value in values.items()}


class Recorded(UnlearningModule):
    """Keeps the gradient that the optimizer of every step gets."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        gradients = [p.grad.flatten() for p in self.policy.parameters() if p.grad is not None]
        self.gradients = [*getattr(self, "gradients", []), torch.cat(gradients).double()]


@pytest.fixture
def gradients(golden_models: dict[str, Path]) -> Any:
    """Gradient of every step over some batches at a learning rate of 0, and the module after them."""

    def run(
        objective: Objective, batches: list[Any], retain_loss: RetainLoss | None = None, **kw: Any
    ) -> tuple[list[torch.Tensor], UnlearningModule]:
        paths = {"name": str(golden_models["policy"]), "reference": str(golden_models["target"])}
        module = Recorded(**paths, objective=objective, retain_loss=retain_loss or NLL(), lr=0.0, **kw)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
        trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
        trainer.fit(module, DataLoader(copy.deepcopy(batches), batch_size=None))
        return module.gradients, module

    return run


def one_step(gradients: Any, objective: Objective, batch: Any, *args: Any, **kw: Any) -> tuple[float, float, float]:
    """Forget loss, retain loss and norm of the gradient."""
    found, module = gradients(objective, [batch], *args, **kw)
    values = (module.trainer.callback_metrics[f"train/{name}_loss"].item() for name in ("forget", "retain"))
    return *values, found[0].norm().item()


@pytest.mark.parametrize("refusal", ["No idea", "comma"])
def test_jensun(gradients: Any, refusal: str):
    golden, pattern = GOLDEN["jensun"]["cases"][refusal], GOLDEN["jensun"]["patterns"][refusal]
    row = torch.tensor([[0, *pattern, 0]]).repeat(4, 1)
    alternate = {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}
    # The first token is the prompt's, the last the refusal's end.
    alternate["labels"][:, 0], alternate["end"] = -100, torch.ones(4, dtype=torch.long)
    batch = {"forget": part(BATCH["forget"]), "retain": part(BATCH["retain"]), "alternate": alternate}
    forget, retain, norm = one_step(gradients, JensUn(), batch, JSD())
    assert forget == pytest.approx(golden["forget_loss"], rel=5e-5)
    assert retain == pytest.approx(golden["retain_loss"], rel=2e-5)
    assert norm == pytest.approx(golden["grad_norm"], rel=2e-5)


def test_ihl(gradients: Any):
    golden = GOLDEN["ihl"]
    batch = {name: part(BATCH[name]) for name in ("forget", "retain")}
    forget, retain, norm = one_step(gradients, IHL(), batch)
    assert forget == pytest.approx(golden["forget_loss"], rel=2e-5)
    assert retain == pytest.approx(golden["retain_loss"], rel=2e-5)
    assert norm == pytest.approx(golden["grad_norm"], rel=2e-5)


def test_altpo(gradients: Any):
    """Two alternates a question make two rows of it."""
    golden = GOLDEN["altpo"]
    twice = [row for row in range(4) for _ in range(2)]
    batch = {
        "forget": part(BATCH["forget"], twice),
        "sampled": part(golden["alternate_batch"]),
        "retain": part(BATCH["retain"]),
    }
    forget, retain, norm = one_step(gradients, AltPO(beta=golden["beta"]), batch)
    assert forget == pytest.approx(golden["forget_loss"], rel=2e-5)
    assert retain == pytest.approx(golden["retain_loss"], rel=2e-5)
    assert norm == pytest.approx(golden["grad_norm"], rel=2e-5)


@pytest.mark.parametrize(
    ("case", "objective"),
    [
        ("open_unlearning_NPO", NPO()),
        ("open_unlearning_SimNPO", SimNPO()),
        ("open_unlearning_SimNPO_beta0.5", SimNPO(beta=0.5)),
        ("open_unlearning_GradAscent", GradAscent()),
    ],
)
def test_sam(gradients: Any, golden_models: dict[str, Path], case: str, objective: Objective):
    """At the weights 1 and 1 and at 0.5 and 2, by the stored scalar product; the weights are restored to the bit."""
    golden = GOLDEN["sam"][case]
    batch = {name: part(BATCH[name]) for name in ("forget", "retain")}
    forget, retain = golden["forget_grad_norm_perturbed"], golden["retain_grad_norm"]
    for a, b in ((1.0, 1.0), (0.5, 2.0)):
        found, module = gradients(objective, [batch], update=SAM(golden["rho"]), forget_weight=a, retain_weight=b)
        product = 2 * a * b * golden["dot_perturbed_forget_retain"]
        expected = ((a * forget) ** 2 + (b * retain) ** 2 + product) ** 0.5
        assert found[0].norm().item() == pytest.approx(expected, rel=2e-5)
    assert expected != pytest.approx(golden["combined_grad_norm"], rel=0.1)
    fresh = UnlearningModule(str(golden_models["policy"]))
    fresh.configure_model()
    pairs = zip(module.policy.parameters(), fresh.policy.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def apart(update: UpdateRule | None, gradients: Any, batches: list[Any], **kw: Any) -> list[torch.Tensor]:
    return gradients(NPO(), batches, update=update, **kw)[0]


@pytest.mark.parametrize("newest", [0.8, 1.0])
@pytest.mark.parametrize("order", ["same_batch", "row_t", "row_t_reversed_retain"])
def test_gru(gradients: Any, order: str, newest: float):
    """Three steps; the stored scalar products with both gradients, too."""
    golden = GOLDEN["gru"][f"{order}_gamma{newest}"]
    batches = [{name: part(BATCH[name]) for name in ("forget", "retain")}] * 3
    if order != "same_batch":
        retain = [0, 1, 2] if order == "row_t" else [3, 2, 1]
        batches = [
            {"forget": part(BATCH["forget"], [t]), "retain": part(BATCH["retain"], [retain[t]])} for t in range(3)
        ]
    found = apart(GRU(newest), gradients, batches)
    forget = apart(None, gradients, batches, retain_weight=0.0)
    retained = apart(None, gradients, batches, forget_weight=0.0)
    for step, one, g, r in zip(golden, found, forget, retained, strict=True):
        assert one.norm().item() == pytest.approx(step["rectified_norm"], rel=2e-5)
        for name, other in (("forget", g), ("retain", r)):
            within = 1e-5 * (one.norm() * other.norm()).item()
            assert (one @ other).item() == pytest.approx(step[f"rectified_dot_{name}"], abs=within)
    assert any(step["projected"] for step in golden)
