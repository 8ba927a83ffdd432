"""An evaluation whose batches do not fit into memory continues with smaller ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from simnpo_pl.data.tokenization import IGNORE_INDEX, TokenRow
from simnpo_pl.evaluation.memory import Halves, is_out_of_memory
from simnpo_pl.evaluation.plan import Generation, Split, generation_batches, scoring_batches
from simnpo_pl.models.generation import most_probable
from simnpo_pl.module.policy import PolicyModule

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_ERROR), MemoryError()]


def rows(count: int) -> list[list[TokenRow]]:
    """Questions of two tokens with one answer each, every one longer than the one before."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 200, (4 + n,), generator=generator).tolist() for n in range(count)]
    return [[TokenRow(row, [IGNORE_INDEX] * 2 + row[2:])] for row in ids]


def batches(kind: str) -> list[dict[str, Any]]:
    answers = rows(7)
    prompts = [row[0].input_ids[:3] for row in answers]
    splits = [Split("forget", [{} for _ in answers], answers, {}, Generation(prompts, 6))]
    return generation_batches(splits, 7) if kind == "prompts" else scoring_batches(splits, 40)


class Module(PolicyModule):
    """Evaluates without a trainer; has memory for so many rows."""

    def __init__(self, folder: Path, fits: int, error: BaseException) -> None:
        super().__init__(str(folder))
        self.policy = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.fits, self.error, self.tried = fits, error, []
        self.evaluation = Evaluation()  # type: ignore[assignment]

    def evaluate(self, plan: list[dict[str, Any]]) -> None:
        """Twice, with the plans that the Trainer's batches have, which halves cannot use."""
        for batch in [*plan, *plan]:
            self._evaluate(self.transfer_batch_to_device(batch, torch.device("cpu"), 0))

    def _run(self, batch: dict[str, Any]) -> Any:
        self.tried.append(len(batch["index"]))
        if len(batch["index"]) > self.fits:
            raise self.error
        return super()._run(batch)

    def _end_ids(self) -> list[int]:
        return []


class Evaluation:
    """Scores, one of them only where some row is even."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, Any], Any]] = []

    def score(self, states: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        scores = {"nll": -states.logps().mean.detach()}
        some = batch["index"] >= 4
        return {**scores, "late": scores["nll"].masked_fill(~some, torch.nan)} if some.any() else scores

    def choice(self, batch: dict[str, Any]) -> Any:
        return most_probable

    def add_scores(self, batch: dict[str, Any], scores: Any) -> None:
        self.found.append((batch, scores))

    add_generations = add_scores


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "processor", "python"])
@pytest.mark.parametrize("kind", ["prompts", "answers"])
def test_continues_with_half(kind: str, error: BaseException, model_folder: Path):
    """The outcome is that of whole batches, row by row; what did not fit once is not tried again."""
    plan = batches(kind)
    whole, short = Module(model_folder, 99, error), Module(model_folder, 2, error)
    with pytest.warns(UserWarning, match=f"out of memory with .* {kind} at once: continuing with half as many"):
        short.evaluate(plan)
    whole.evaluate(plan)
    assert whole.tried == 2 * [len(batch["index"]) for batch in plan]
    assert sum(tried > 2 for tried in short.tried) <= 3
    for (_, expected), (_, found) in zip(whole.evaluation.found, short.evaluation.found, strict=True):
        if kind == "prompts":
            assert found == expected
        else:
            assert found.keys() == expected.keys()
            for name in found:
                torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_one_row_that_does_not_fit():
    def run(batch: dict[str, Any]) -> Any:
        raise torch.OutOfMemoryError("one row of 9000 tokens")

    with (
        pytest.warns(UserWarning, match="out of memory with 2 answers at once"),
        pytest.raises(torch.OutOfMemoryError, match="one row of 9000 tokens"),
    ):
        Halves(run)(batches("answers")[-1] | {"index": torch.tensor([0, 1]), "input_ids": torch.ones(2, 9)})


def test_other_errors_are_not_caught():
    def run(batch: dict[str, Any]) -> Any:
        raise RuntimeError("shapes do not match")

    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Halves(run)(batches("answers")[0])
