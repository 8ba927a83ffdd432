"""What is measured: splits, and their rows cut into batches of similar length, shared among processes."""

import hashlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import by_length, collate
from simnpo_pl.evaluation.fluency import FLUENCY, FluencyClassifier
from simnpo_pl.evaluation.options import EvalOptions
from simnpo_pl.evaluation.scoring import GRADIENT_NORM
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.functional import ROUGE, rouge_l
from simnpo_pl.metrics.generated import TEXT_SCORES
from simnpo_pl.utils.errors import UserError

Batch = dict[str, Any]
OF_GENERATED = (*ROUGE, *TEXT_SCORES, FLUENCY)
"""Scores of generated answers."""
ONE_A_ROW = (*OF_GENERATED, GRADIENT_NORM)
"""Scores that only a row's first answer has."""
PLACES = ("split", "index", "kind", "end")
"""Where scores are stored, and length of the answer's end; `(B,)` each."""


@dataclass
class Generation:
    """What is generated for the rows of a split, and how it is scored.

    Args:
        prompts: Token ids before the generated ones, of the first rows; for other rows nothing is generated.
        max_new_tokens: Generated tokens at most.
        finish: Turns the decoded text into the text that is kept and scored, such as its part before a stop word.
        score: Scores of (kept text, the row's answer), by name.
        fluency: Rates kept texts; None rates none.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    finish: Callable[[str], str] = str.strip
    score: Callable[[str, str], dict[str, float]] = rouge_l
    fluency: FluencyClassifier | None = None


class RawScores(RowMetric):
    """Keeps every cell of a split's losses, for the logs."""

    cells: Tensor

    def complete(self, seen: Tensor) -> Tensor:
        return seen.any(dim=1)

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        self.cells, self.answered = values.masked_fill(~seen, math.nan), seen[:, 0]
        return values[:, 0]


@dataclass
class Split:
    """Rows that are measured.

    Args:
        name: Such as `forget`; first part of the names of its results.
        texts: Question and answer of every row, and whatever else the logs say of it.
        answers: Tokens of every row's answers: the answer, its paraphrase if there is one, the perturbed answers; the
            same number for every row. Empty if no answer is scored.
        metrics: What is computed from the rows' scores, by name.
        generation: What is generated; None for nothing.
        has_paraphrase: Whether the second answer of a row is a paraphrase of the first.
        scores: Scores by row that metrics over several splits read, by name; logged by row, not averaged.
        paraphrases: Every row's question in other words, for attacks; None where the data has none.
    """

    name: str
    texts: list[dict[str, Any]]
    answers: list[list[TokenRow]]
    metrics: dict[str, RowMetric]
    generation: Generation | None = None
    has_paraphrase: bool = False
    scores: dict[str, RowMetric] = field(default_factory=dict)
    paraphrases: list[str] | None = None

    @cached_property
    def raw(self) -> RawScores:
        return RawScores(len(self.texts), self.kinds)

    @property
    def all_metrics(self) -> list[RowMetric]:
        return [*self.metrics.values(), *self.scores.values()]

    def readers(self, feature: str) -> list[RowMetric]:
        """The metrics that read a score."""
        return [metric for metric in self.all_metrics if metric.feature == feature]

    @property
    def kinds(self) -> int:
        """Answers of each row, at least 1."""
        return len(self.answers[0]) if self.answers else 1

    @property
    def tokens(self) -> list[str]:
        """Digest of every row's tokens: another prompt, truncation or tokenizer gives another digest."""
        rows = ([(row.input_ids, row.labels, row.end) for row in answers] for answers in self.answers)
        return [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in rows]

    @property
    def generate(self) -> int:
        """Rows, from the first, for which an answer is generated."""
        return len(self.generation.prompts) if self.generation is not None else 0

    def digest(self) -> str:
        """Identity of what is scored and generated."""
        made, read = self.generation, sorted({(metric.feature, metric.kinds) for metric in self.all_metrics})
        content = (self.name, read, self.texts, self.tokens, made and (made.prompts, made.max_new_tokens))
        return hashlib.sha256(repr(content).encode()).hexdigest()


def add_metrics(splits: Sequence[Split], entries: Sequence[Mapping[str, Any]]) -> None:
    """Build metrics and give them to their splits.

    Args:
        splits: What the benchmark measures.
        entries: `class_path` and `split`; optional `name` and `init_args`.

    Raises:
        UserError: There is no such split or class, the class cannot be built, or its name is taken.
    """
    by_name = {split.name: split for split in splits}
    for entry in entries:
        path, where = entry["class_path"], f"--eval.metrics {entry['class_path']}"
        split = by_name.get(entry["split"])
        if split is None:
            raise UserError(f"{where}: no split {entry['split']!r}; this benchmark measures {', '.join(by_name)}")
        kind = _load(path, where)
        name = f"{split.name}/{entry.get('name') or re.sub(r'(?<!^)(?=[A-Z])', '_', kind.__name__).lower()}"
        if name in split.metrics:
            raise UserError(f"{where}: {name} is measured already; give this one another name")
        sizes = {"rows": len(split.texts)}
        if "kinds" in inspect.signature(kind).parameters and kind.feature not in ONE_A_ROW:
            sizes["kinds"] = split.kinds
        try:
            split.metrics[name] = kind(**sizes, **entry.get("init_args", {}))
        except Exception as error:
            given = ", ".join([*sizes, *entry.get("init_args", {})])
            raise UserError(f"{where}: cannot be built with {given} ({' '.join(str(error).split())})") from error


def largest_id(splits: Sequence[Split]) -> int:
    """Largest token id that an evaluation reads; 0 where it reads none."""
    rows = [row.input_ids for split in splits for answers in split.answers for row in answers]
    rows += [prompt for split in splits if split.generation is not None for prompt in split.generation.prompts]
    return max((max(ids) for ids in rows if ids), default=0)


def share_of(batches: Sequence[Batch], rank: int = 0, world_size: int = 1, first: int = 0) -> list[Batch]:
    """The batches of one process; every process has equally many, the first ones repeated if needed.

    Repeats do no harm: scores are held by row, so a row scored twice counts once. Sharded models need equal numbers,
    since their forward passes wait for each other.

    Args:
        batches: Of all processes.
        rank: This process.
        world_size: Number of processes.
        first: Number of the first batch.

    Returns:
        Batches with their `number` and, as `turn`, the numbers of the batches that all processes run at that time.
    """
    turns = [
        tuple(first + (start + i) % len(batches) for i in range(world_size))
        for start in range(0, len(batches), world_size)
    ]
    return [{**batches[turn[rank] - first], "number": turn[rank], "turn": turn} for turn in turns]


def eval_loader(trainer: Any, splits: Sequence[Split], options: EvalOptions, scored: bool = True) -> DataLoader:
    """One process's share of the batches: answers to score, unless `scored` is false, then prompts to generate.

    Raises:
        UserError: There is no batch.
    """
    tokens, prompts = options.batch_sizes(trainer)
    kinds = [scoring_batches(splits, tokens), gradient_batches(splits)] if scored else []
    kinds.append(generation_batches(splits, prompts))
    if not any(kinds):
        raise UserError("no answers are generated, see --eval.generate_rows, and none are scored: use test for scores")
    shares: list[Batch] = []
    first = 0
    for batches in kinds:
        shares += share_of(batches, trainer.global_rank, trainer.world_size, first)
        first += len(batches)
    # A list is a data set: it has a length and gives items.
    return DataLoader(shares, batch_size=None)  # type: ignore[arg-type]


def scoring_batches(splits: Sequence[Split], tokens: int) -> list[Batch]:
    """All answers of all splits, longest first, in batches of at most `tokens` tokens.

    Returns:
        Batches with `input_ids`, `labels`, `attention_mask` `(B, T)` and `split`, `index`, `kind`, `end` `(B,)`.
    """
    items = _answers(splits, range(len(splits)))
    batches = by_length([item[0] for item in items], tokens)
    return [_scored([items[i] for i in chosen]) for chosen in batches]


def gradient_batches(splits: Sequence[Split]) -> list[Batch]:
    """The answers whose gradient norm is read, longest first, one a batch.

    Returns:
        Batches like those of `scoring_batches`, with a key `gradients`.
    """
    chosen = [number for number, split in enumerate(splits) if split.readers(GRADIENT_NORM)]
    items = _answers(splits, chosen, kinds=1)
    return [{**_scored([items[i]]), "gradients": True} for (i,) in by_length([item[0] for item in items], 1)]


def generation_batches(splits: Sequence[Split], prompts: int) -> list[Batch]:
    """Prompts of the rows to generate, longest first, in batches of at most `prompts`.

    Returns:
        Batches with `prompts` (lists of token ids), `max_new_tokens` and `split`, `index` `(B,)`.
    """
    by_limit: dict[int, list[Any]] = {}
    for number, split in enumerate(splits):
        if split.generation is not None:
            rows = by_limit.setdefault(split.generation.max_new_tokens, [])
            rows += [(ids, number, index) for index, ids in enumerate(split.generation.prompts)]
    batches = []
    for limit, rows in by_limit.items():
        rows.sort(key=lambda row: -len(row[0]))
        for start in range(0, len(rows), prompts):
            ids, numbers, indices = zip(*rows[start : start + prompts], strict=True)
            batch = {"split": torch.tensor(numbers), "index": torch.tensor(indices)}
            batches.append({"prompts": list(ids), "max_new_tokens": limit, **batch})
    return batches


def _answers(splits: Sequence[Split], chosen: Sequence[int], kinds: int | None = None) -> list[Any]:
    """Tokens, split, index and kind of every answer."""
    rows = [(number, index, row) for number in chosen for index, row in enumerate(splits[number].answers)]
    return [(row, number, index, kind) for number, index, answers in rows for kind, row in enumerate(answers[:kinds])]


def _scored(items: Sequence[Any]) -> Batch:
    rows, splits, indices, kinds = zip(*items, strict=True)
    numbers = splits, indices, kinds, [row.end for row in rows]
    return {**collate(rows), **{name: torch.tensor(n) for name, n in zip(PLACES, numbers, strict=True)}}


def _load(path: str, where: str) -> type[RowMetric]:
    try:
        kind = pkgutil.resolve_name(path)
    except Exception as error:
        raise UserError(f"{where}: no such class ({error}); give MODULE.CLASS of a module that Python finds") from error
    if not (isinstance(kind, type) and issubclass(kind, RowMetric)):
        raise UserError(f"{where}: expected a subclass of simnpo_pl.metrics.base.RowMetric, got {kind!r}")
    return kind
