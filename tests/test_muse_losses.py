"""Losses of text in blocks by the papers' formulas, as recorded for the first two blocks of a small corpus."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from helpers import golden as read_golden
from simnpo_pl.data.text import text_blocks
from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import collate
from simnpo_pl.module.unlearning import UnlearningModule
from simnpo_pl.objectives import NPO, GradAscent, GradDiff, SimNPO


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return read_golden("losses.json")["muse"]


@pytest.fixture(scope="module")
def blocks(golden: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The first two blocks of forget and retain text."""
    ids = {name: golden["batch"][f"{name}_input_ids"] for name in ("forget", "retain")}
    return {name: collate([TokenRow(row, [-100, *row[1:]]) for row in rows]) for name, rows in ids.items()}


def losses(golden_models: dict[str, Path], blocks: dict[str, Any], **settings: Any) -> tuple[float, float]:
    """Value and gradient norm of a whole loss on these blocks."""
    module = UnlearningModule(
        str(golden_models["target"]), reference=str(golden_models["retain"]), forget_weight=1.0, **settings
    )
    module.configure_model()
    loss = module.losses(blocks)["loss"]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in module.policy.parameters() if p.grad is not None]).norm()
    return loss.item(), norm.item()


def objective(entry: dict[str, Any]) -> NPO | SimNPO:
    if entry["loss"] == "NPO":
        return NPO(entry["beta"])
    # The third form multiplies its margin by beta, which is a paper's margin of that size.
    factor = 1.0 if entry["formula"] == "paper" else entry["beta"]
    return SimNPO(entry["beta"], gamma=factor * entry["gamma"])


def test_blocks_are_those_recorded(golden: dict[str, Any], shared: Path):
    """As cut by this package from the corpus."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "goldens/A/target")
    folder = shared / "goldens/muse/corpus/raw"
    texts = {name: (folder / f"{file}.txt").read_text() for name, file in (("forget", "forget"), ("retain", "retain1"))}
    blocks = {name: collate(text_blocks(tokenizer, text, 128)[:2]) for name, text in texts.items()}
    assert blocks["forget"]["input_ids"].tolist() == golden["batch"]["forget_input_ids"]
    assert blocks["retain"]["input_ids"].tolist() == golden["batch"]["retain_input_ids"]
    scored = (blocks["forget"]["labels"][:, 1:] != -100).sum(dim=1).tolist()
    assert scored == [golden["n_scored_tokens"]] * 2


@pytest.mark.parametrize("number", range(8))
def test_papers_formulas(golden_models: dict[str, Path], golden: dict[str, Any], blocks: dict[str, Any], number: int):
    entry = golden["paper"][number]
    value, norm = losses(golden_models, blocks, objective=objective(entry), retain_loss=None)
    assert value == pytest.approx(entry["value"], rel=1e-5)
    assert norm == pytest.approx(entry["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("number", range(6))
def test_papers_formulas_on_retain_blocks(
    golden_models: dict[str, Path], golden: dict[str, Any], blocks: dict[str, Any], number: int
):
    """Where policy and reference are close, so that NPO's beta matters."""
    entry = [entry for entry in golden["on_retain_blocks"] if entry["formula"] == "paper"][number]
    value, _ = losses(golden_models, {"forget": blocks["retain"]}, objective=objective(entry), retain_loss=None)
    assert value == pytest.approx(entry["value"], rel=1e-5)


@pytest.mark.parametrize("kind", ["ga", "ga_gdr"])
def test_gradient_ascent(golden_models: dict[str, Path], golden: dict[str, Any], blocks: dict[str, Any], kind: str):
    entry = next(e for e in golden["repository"] if e["code"] == "muse_bench" and e["loss_type"] == kind)
    value, norm = losses(golden_models, blocks, objective=GradAscent() if kind == "ga" else GradDiff())
    assert value == pytest.approx(entry["value"], rel=1e-5)
    assert norm == pytest.approx(entry["grad_norm"], rel=1e-5)
