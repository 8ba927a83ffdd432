"""leak@k of finished runs: sample answers to the forget questions and take the best of k by ROUGE-L recall.

Greedy answers may hide what sampled ones show. Reported for every k up to --k is the mean over rows of the expected
best of k among the drawn answers. The answers go to leak_K_TEMPERATURE_SEED.jsonl in the run's folder, the best one
first. What a run's results.json already holds is skipped.
"""

from argparse import Namespace
from functools import partial
from math import comb
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.evaluation.evaluation import gather_texts
from simnpo_pl.evaluation.plan import share_of
from simnpo_pl.models.generation import Sampler, draws_of, generate
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.report.robustness import leak_table
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import finished_runs, measure_once, reopen
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json_lines

SCORE = "rougeL_recall"


def run(options: Namespace) -> None:
    runs = finished_runs(options.runs)
    k, temperature, seed = options.k, options.temperature, options.seed
    key = f"k={k} temperature={temperature:g} seed={seed}"
    for one in runs:
        measure_once(one, "leak", key, sample, k, temperature, seed)
    rank_zero_only(print)(leak_table(runs))


def sample(run: Run, k: int, temperature: float, seed: int) -> dict[str, Any]:
    """Sample the forget answers of a run into a file; settings, number of rows and metrics."""
    opened = reopen(run, "--eval.splits", "[forget]", "--eval.generate_rows", "null")
    trainer: Any = opened.trainer
    data, model = opened.datamodule, opened.model
    data.prepare_data()
    data.setup("validate")
    (part,) = data.evaluation().splits
    plan = part.generation
    if plan is None:
        raise UserError(f"{run.folder}: its forget split has no answers to generate")
    kind = {"dtype": model.dtype_name, "attn_implementation": model.attn_implementation}
    module = SamplingModule(model.name, data, plan, k, temperature, seed, **kind)
    count = len(part.texts)
    rank_zero_only(print)(f"{run.name}: drawing {k} answers for each of {count} rows", flush=True)
    trainer.test(module, verbose=False)
    drawn = [[module.texts[row, answer] for answer in range(k)] for row in range(count)]
    scores = torch.tensor(
        [[plan.score(text, part.texts[row]["answer"])[SCORE] for text in drawn[row]] for row in range(count)]
    )
    rows = []
    for row, values in enumerate(scores.tolist()):
        order = sorted(range(k), key=lambda answer: -values[answer])
        answers = [{SCORE: values[answer], "generation": drawn[row][answer]} for answer in order]
        rows.append({"split": part.name, "index": row, **part.texts[row], "samples": answers})
    rank_zero_only(write_json_lines)(run.folder / f"leak_{k}_{temperature:g}_{seed}.jsonl", rows)
    metrics = {f"leak@{i}": value for i, value in enumerate(expected_best(scores).mean(dim=0).tolist(), start=1)}
    settings = {"k": k, "temperature": temperature, "seed": seed, "max_new_tokens": plan.max_new_tokens}
    return {"settings": settings, "n": count, "metrics": metrics}


def expected_best(scores: Tensor) -> Tensor:
    """Mean, over all choices of k out of the K scores of a row, of the best one chosen: `(N, K)`, k from 1 to K.

    The score at place i of the sorted ones, from 0, is the best of C(i, k - 1) choices out of C(K, k); so k = 1 gives
    the mean, k = K the maximum, and nothing depends on the order in which the answers were drawn.

    Args:
        scores: `(N, K)`.

    Example:
        >>> expected_best(torch.tensor([[3.0, 0.0, 0.0]]))
        tensor([[1., 2., 3.]], dtype=torch.float64)
    """
    count = scores.shape[1]
    weights = [[comb(i, k - 1) / comb(count, k) for k in range(1, count + 1)] for i in range(count)]
    return scores.double().sort(dim=1).values @ torch.tensor(weights, dtype=torch.float64)


class SamplingModule(PolicyModule):
    """Samples `k` answers to each prompt of a plan; the Trainer's `test` fills `texts`, by row and answer."""

    def __init__(self, name: str, data: Any, plan: Any, k: int, temperature: float, seed: int, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        self.data, self.plan, self.k, self.temperature, self.seed = data, plan, k, temperature, seed
        self.decode = partial(data.tokenizer.decode, skip_special_tokens=True)
        self.texts: dict[tuple[int, int], str] = {}

    @property
    def _data(self) -> Any:
        return self.data

    def test_dataloader(self) -> DataLoader:
        """Every row k times, prompts of similar length together; each process its share."""
        order = sorted(range(len(self.plan.prompts)), key=lambda row: -len(self.plan.prompts[row]))
        cells = [(row, answer) for row in order for answer in range(self.k)]
        _, size = self.data.eval.batch_sizes(self.trainer)
        batches = [{"cells": cells[start : start + size]} for start in range(0, len(cells), size)]
        share: Any = share_of(batches, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(share, batch_size=None, collate_fn=lambda batch: batch)

    def on_test_epoch_start(self) -> None:
        pass

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        limit, cells = self.plan.max_new_tokens, batch["cells"]
        draws = torch.stack([draws_of(self.seed, row, answer, limit) for row, answer in cells])
        sampler = Sampler(draws.to(self.device), self.temperature)
        answers = generate(self.policy, [self.plan.prompts[row] for row, _ in cells], limit, self._end_ids(), sampler)
        for cell, ids in zip(cells, answers, strict=True):
            self.texts[cell] = self.plan.finish(self.decode(ids))

    def on_test_epoch_end(self) -> None:
        self.texts = gather_texts(self.texts)
