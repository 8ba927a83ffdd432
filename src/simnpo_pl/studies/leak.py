"""leak@k of finished runs: sample answers to the forget questions and take the best of k by ROUGE-L recall.

Greedy answers may hide what sampled ones show. Reported for every k up to --k is the mean over rows of the expected
best of k among the drawn answers. The answers go to leak_K_TEMPERATURE_SEED.jsonl in the run's folder, the best one
first. What a run's results.json already holds is skipped.
"""

from argparse import Namespace
from functools import partial
from math import comb
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.evaluation.evaluation import gather_texts
from simnpo_pl.evaluation.plan import EvalBatches, EvalSet
from simnpo_pl.metrics.base import RowMetric
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
    (part,) = data.evaluation().sets
    if part.generation is None:
        raise UserError(f"{run.folder}: its forget split has no answers to generate")
    kind = {"dtype": model.dtype_name, "attn_implementation": model.attn_implementation}
    module = SamplingModule(model.name, data, part, k, temperature, seed, **kind)
    rank_zero_only(print)(f"{run.name}: drawing {k} answers for each of {len(part.texts)} rows", flush=True)
    trainer.test(module, verbose=False)
    rows = []
    for index, drawn in module.scores.rows.items():
        scores = cast(list[float], drawn)
        order = sorted(range(k), key=lambda answer: -scores[answer])
        answers = [{SCORE: scores[answer], "generation": module.texts[index, answer]} for answer in order]
        rows.append({"split": part.name, "index": index, **part.texts[index], "samples": answers})
    rank_zero_only(write_json_lines)(run.folder / f"leak_{k}_{temperature:g}_{seed}.jsonl", rows)
    settings = {"k": k, "temperature": temperature, "seed": seed, "max_new_tokens": part.generation.max_new_tokens}
    metrics = dict(module.metrics)
    return {"settings": settings, "n": int(metrics.pop("n")), "metrics": metrics}


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


class LeakAtK(RowMetric):
    """Best of k sampled answers, for every k up to the number of samples; the kind of a score is its sample."""

    feature = SCORE
    higher_is_better = False

    def __init__(self, rows: int, samples: int) -> None:
        super().__init__(rows, samples)
        self.result_keys = tuple(f"leak@{k}" for k in range(1, samples + 1))

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        return values

    def aggregate(self, row_values: Tensor) -> dict[str, float]:
        return dict(zip(self.result_keys, expected_best(row_values).mean(dim=0).tolist(), strict=True))


class SamplingModule(PolicyModule):
    """Samples `k` answers of each row of a split; the Trainer's `test` fills `scores`, `texts` and `metrics`."""

    def __init__(
        self, name: str, data: Any, part: EvalSet, k: int, temperature: float, seed: int, **kwargs: Any
    ) -> None:
        super().__init__(name, **kwargs)
        assert part.generation is not None
        self.part, self.plan, self.data = part, part.generation, data
        self.k, self.temperature, self.seed = k, temperature, seed
        self.decode = partial(data.tokenizer.decode, skip_special_tokens=True)
        self.scores = LeakAtK(len(part.texts), k)
        self.texts: dict[tuple[int, int], str] = {}
        self.metrics: dict[str, float] = {}

    @property
    def _data(self) -> Any:
        return self.data

    def test_dataloader(self) -> DataLoader:
        """Every row k times, prompts of similar length together; each process its share."""
        order = sorted(range(len(self.plan.prompts)), key=lambda row: -len(self.plan.prompts[row]))
        cells = [(row, answer) for row in order for answer in range(self.k)]
        size = self.data.eval.prompts_per_batch
        batches = [{"cells": cells[start : start + size]} for start in range(0, len(cells), size)]
        share = EvalBatches(batches, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(share, batch_size=None, collate_fn=lambda batch: batch)

    def on_test_epoch_start(self) -> None:
        pass

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        limit, cells = self.plan.max_new_tokens, batch["cells"]
        draws = torch.stack([draws_of(self.seed, row, answer, limit) for row, answer in cells])
        sampler = Sampler(draws.to(self.device), self.temperature)
        answers = generate(self.policy, [self.plan.prompts[row] for row, _ in cells], limit, self._end_ids(), sampler)
        found = []
        for (row, answer), ids in zip(cells, answers, strict=True):
            text = self.texts[row, answer] = self.plan.finish(self.decode(ids))
            found.append(self.plan.score(text, self.part.texts[row]["answer"])[SCORE])
        rows, columns = torch.tensor(cells).unbind(1)
        self.scores.update(rows, columns, {SCORE: torch.tensor(found, dtype=torch.float32)})

    def on_test_epoch_end(self) -> None:
        self.metrics = self.scores.compute()
        self.texts = gather_texts(self.texts)
