"""leak@k: greedy answers may hide what sampled ones show, so k answers are drawn and the best one is taken."""

from dataclasses import asdict, dataclass
from math import comb
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.benchmarks.splits import decode_with
from simnpo_pl.evaluation.evaluation import gather_texts
from simnpo_pl.evaluation.plan import EvalBatches, EvalSet
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.models.generation import Sampler, draws_of, generate
from simnpo_pl.module.policy import PolicyModule
from simnpo_pl.runs.record import Run
from simnpo_pl.studies.reopen import add_results, reopen
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import write_json_lines

SCORE = "rougeL_recall"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        k: Answers a row.
        temperature: Of the softmax, above 0.
        seed: With row and number of the answer it decides every draw.
    """

    k: int
    temperature: float
    seed: int

    @property
    def key(self) -> str:
        """The settings in one line; where results keep the scores."""
        return f"k={self.k} temperature={self.temperature:g} seed={self.seed}"


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
    """Best of k sampled answers, for every k up to the number of samples; the kind of a score is its sample.

    Args:
        rows: Number of rows.
        samples: Answers a row.
    """

    feature = SCORE
    higher_is_better = False

    def __init__(self, rows: int, samples: int) -> None:
        super().__init__(rows, samples)
        self.result_keys = tuple(f"leak@{k}" for k in range(1, samples + 1))

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        """`(N, K)` scores; they are reduced over rows alone."""
        return values

    def aggregate(self, row_values: Tensor) -> dict[str, float]:
        """Mean over the rows."""
        return dict(zip(self.result_keys, expected_best(row_values).mean(dim=0).tolist(), strict=True))


class SamplingModule(PolicyModule):
    """Samples answers of a split; the Trainer's `test` fills `scores` and `texts`.

    Args:
        name: Model folder.
        data: Data module that has been set up for evaluation.
        part: The split.
        sampling: How answers are drawn.
    """

    def __init__(self, name: str, data: Any, part: EvalSet, sampling: Sampling, **kwargs: Any) -> None:
        super().__init__(name, **kwargs)
        assert part.generation is not None
        self.part, self.plan, self.sampling = part, part.generation, sampling
        self.data = data
        self.decode = decode_with(data.tokenizer)
        self.scores = LeakAtK(len(part.texts), sampling.k)
        self.texts: dict[tuple[int, int], str] = {}
        self.metrics: dict[str, float] = {}

    @property
    def _data(self) -> Any:
        return self.data

    def test_dataloader(self) -> DataLoader:
        """Every row k times, prompts of like length together; each process its share."""
        order = sorted(range(len(self.plan.prompts)), key=lambda row: -len(self.plan.prompts[row]))
        cells = [(row, sample) for row in order for sample in range(self.sampling.k)]
        size = self.data.eval.prompts_per_batch
        batches = [{"cells": cells[start : start + size]} for start in range(0, len(cells), size)]
        share = EvalBatches(batches, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(share, batch_size=None, collate_fn=lambda batch: batch)

    def on_test_epoch_start(self) -> None:
        """Forget earlier samples."""
        self.scores.reset()
        self.texts.clear()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Draw and score one batch of answers."""
        limit, seed = self.plan.max_new_tokens, self.sampling.seed
        prompts = [self.plan.prompts[row] for row, _ in batch["cells"]]
        draws = torch.stack([draws_of(seed, row, sample, limit) for row, sample in batch["cells"]])
        sampler = Sampler(draws.to(self.device), self.sampling.temperature)
        answers = generate(self.policy, prompts, limit, self._end_ids(), sampler)
        found = []
        for (row, sample), ids in zip(batch["cells"], answers, strict=True):
            text = self.texts[row, sample] = self.plan.finish(self.decode(ids))
            found.append(self.plan.score(text, self.part.texts[row]["answer"])[SCORE])
        rows, samples = torch.tensor(batch["cells"]).unbind(1)
        self.scores.update(rows, samples, {SCORE: torch.tensor(found, dtype=torch.float32)})

    def on_test_epoch_end(self) -> None:
        """Gather all answers."""
        self.metrics = self.scores.compute()
        self.texts = gather_texts(self.texts)


def leak(run: Run, sampling: Sampling) -> None:
    """Sample the forget answers of a run, and add the best of k to its results unless they are there.

    The answers go to `leak_K_TEMPERATURE_SEED.jsonl` in the run's folder, the best one first.
    """
    if sampling.key in run.record.get("leak", {}):
        return
    opened = reopen(run, "--eval.splits", "[forget]", "--eval.generate_rows", "null")
    trainer, data, model = opened.trainer, opened.datamodule, opened.model
    data.prepare_data()
    data.setup("validate")
    (part,) = data.evaluation().sets
    if part.generation is None:
        raise UserError(f"{run.folder}: its forget split has no answers to generate")
    kind = {"dtype": model.dtype_name, "attn_implementation": model.attn_implementation}
    module = SamplingModule(model.name, data, part, sampling, **kind)
    if trainer.is_global_zero:
        print(f"{run.name}: drawing {sampling.k} answers for each of {len(part.texts)} rows", flush=True)
    trainer.test(module, verbose=False)
    if not trainer.is_global_zero:
        return
    rows = []
    for index, drawn in module.scores.rows.items():
        scores = cast(list[float], drawn)
        order = sorted(range(sampling.k), key=lambda sample: -scores[sample])
        answers = [{SCORE: scores[sample], "generation": module.texts[index, sample]} for sample in order]
        rows.append({"split": part.name, "index": index, **part.texts[index], "samples": answers})
    write_json_lines(run.folder / f"leak_{sampling.k}_{sampling.temperature:g}_{sampling.seed}.jsonl", rows)
    metrics = dict(module.metrics)
    settings = {**asdict(sampling), "max_new_tokens": part.generation.max_new_tokens}
    entry = {"settings": settings, "n": int(metrics.pop("n")), "metrics": metrics}
    add_results(run, lambda content: content.setdefault("leak", {}).update({sampling.key: entry}))
