"""Which rows an evaluation scores and generates, cut into batches of like length and shared among processes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import collate
from simnpo_pl.evaluation.fluency import FluencyClassifier
from simnpo_pl.evaluation.gradients import GRADIENT_NORM
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.metrics.functional import rouge_l
from simnpo_pl.utils.errors import UserError


@dataclass
class Generation:
    """What is generated greedily for the rows of a split, and how it is scored.

    Args:
        prompts: Token ids before the generated ones, of the first rows; the rest is not generated.
        max_new_tokens: Generated tokens at most.
        finish: Makes of the decoded text what is kept and scored, such as its part before a stop word.
        score: Scores of (kept text, the row's answer), by name.
        fluency: Rates kept texts; None rates none.
    """

    prompts: list[list[int]]
    max_new_tokens: int
    finish: Callable[[str], str] = str.strip
    score: Callable[[str, str], dict[str, float]] = rouge_l
    fluency: FluencyClassifier | None = None


@dataclass
class EvalSet:
    """One split to measure.

    Args:
        name: Such as `forget`; first part of the names of its results.
        texts: Question and answer of every row, and whatever else the logs are to say of it.
        answers: Tokens of every row's answers: the answer, then its paraphrase where there is one, then the
            perturbed answers; the same number for every row. Empty where no answer is scored.
        metrics: What is computed from the rows' scores, by name.
        generation: What is generated; None for nothing.
        has_paraphrase: Whether the second answer of a row is a paraphrase of the first.
        scores: Scores by row that metrics over several splits read, by name; logged by row, not averaged.
    """

    name: str
    texts: list[dict[str, Any]]
    answers: list[list[TokenRow]]
    metrics: dict[str, RowMetric]
    generation: Generation | None = None
    has_paraphrase: bool = False
    scores: dict[str, RowMetric] = field(default_factory=dict)

    def readers(self, feature: str) -> list[RowMetric]:
        """The metrics that read a score."""
        return [m for m in (*self.metrics.values(), *self.scores.values()) if m.feature == feature]

    @property
    def kinds(self) -> int:
        """Answers of each row, at least 1."""
        return len(self.answers[0]) if self.answers else 1

    @property
    def tokens(self) -> list[str]:
        """Digest of every row's tokens: rows with another prompt, truncation or tokenizer have another one."""
        rows = ([(row.input_ids, row.labels, row.end) for row in answers] for answers in self.answers)
        return [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in rows]

    @property
    def generate(self) -> int:
        """Rows, from the first, that are generated."""
        return len(self.generation.prompts) if self.generation is not None else 0


def largest_id(sets: Sequence[EvalSet]) -> int:
    """Largest token id that an evaluation reads; 0 where it reads none."""
    rows = [row.input_ids for part in sets for answers in part.answers for row in answers]
    rows += [prompt for part in sets if part.generation is not None for prompt in part.generation.prompts]
    return max((max(ids) for ids in rows if ids), default=0)


def plan_digest(sets: Sequence[EvalSet]) -> str:
    """Identity of what is measured: splits, metrics, texts and tokens."""
    digest = hashlib.sha256()
    for part in sets:
        digest.update(f"{part.name} {sorted(part.metrics)} {sorted(part.scores)} {part.texts}".encode())
        if part.generation is not None:
            digest.update(f"{part.generation.prompts} {part.generation.max_new_tokens}".encode())
        digest.update(f"{part.tokens}".encode())
    return digest.hexdigest()


class EvalBatches(Dataset[dict[str, Any]]):
    """The batches of one process; every process has equally many, the last ones repeated where needed.

    Repeats do no harm: scores are held by row, so a row scored twice still counts once. Equal numbers are
    what sharded models need, whose forward passes wait for each other.

    A batch brings its `number` among all batches and, as `together`, those of all processes' batches at its turn.

    Args:
        batches: Of all processes.
        rank: This process.
        world_size: Number of processes.
        first: Number of the first batch.
    """

    def __init__(self, batches: Sequence[dict[str, Any]], rank: int = 0, world_size: int = 1, first: int = 0) -> None:
        turns = range(0, len(batches), world_size)
        together = [tuple((start + i) % len(batches) for i in range(world_size)) for start in turns]
        self.batches = [
            {**batches[turn[rank]], "number": first + turn[rank], "together": tuple(first + n for n in turn)}
            for turn in together
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.batches[index]


def eval_loader(trainer: Any, *kinds: list[dict[str, Any]]) -> DataLoader:
    """One process's share of batches of several kinds, one kind after the other.

    Raises:
        UserError: There is no batch.
    """
    if not any(kinds):
        raise UserError("no answers are generated, see --eval.generate_rows, and none are scored: use test for scores")
    shares: list[EvalBatches] = []
    first = 0
    for batches in kinds:
        if batches:
            shares.append(EvalBatches(batches, trainer.global_rank, trainer.world_size, first))
            first += len(batches)
    return DataLoader(ConcatDataset(shares), batch_size=None)


def scoring_batches(sets: Sequence[EvalSet], tokens: int, pad_id: int) -> list[dict[str, Any]]:
    """All answers of all splits, longest first, in batches of at most `tokens` tokens.

    Returns:
        Batches with `input_ids`, `labels`, `attention_mask` `(B, T)` and `set`, `index`, `kind`, `end` `(B,)`.
    """
    flat = [
        (s, i, k, row)
        for s, part in enumerate(sets)
        for i, answers in enumerate(part.answers)
        for k, row in enumerate(answers)
    ]
    flat.sort(key=lambda item: -len(item[3].input_ids))
    batches: list[list[tuple[int, int, int, TokenRow]]] = []
    current: list[tuple[int, int, int, TokenRow]] = []
    for item in flat:
        # Longest first: the first row's length is the batch's width.
        width = len(current[0][3].input_ids) if current else 0
        if current and width * (len(current) + 1) > tokens:
            batches.append(current)
            current = []
        current.append(item)
    if current:
        batches.append(current)
    return [
        {
            **collate([item[3] for item in batch], pad_id),
            "set": torch.tensor([item[0] for item in batch]),
            "index": torch.tensor([item[1] for item in batch]),
            "kind": torch.tensor([item[2] for item in batch]),
            "end": torch.tensor([item[3].end for item in batch]),
        }
        for batch in batches
    ]


def gradient_batches(sets: Sequence[EvalSet], pad_id: int) -> list[dict[str, Any]]:
    """The answers whose gradient norm is read, longest first, one a batch.

    Returns:
        Batches like those of `scoring_batches`, with a key `gradients`.
    """
    chosen = (number for number, part in enumerate(sets) if part.readers(GRADIENT_NORM))
    flat = [(s, i, answers[0]) for s in chosen for i, answers in enumerate(sets[s].answers)]
    flat.sort(key=lambda item: -len(item[2].input_ids))
    return [
        {
            **collate([row], pad_id),
            "set": torch.tensor([number]),
            "index": torch.tensor([index]),
            "kind": torch.tensor([0]),
            "end": torch.tensor([row.end]),
            "gradients": True,
        }
        for number, index, row in flat
    ]


def generation_batches(sets: Sequence[EvalSet], prompts: int) -> list[dict[str, Any]]:
    """Prompts of the rows to generate, longest first, in batches of at most `prompts`.

    Returns:
        Batches with `prompts` (lists of token ids), `max_new_tokens` and `set`, `index` `(B,)`.
    """
    by_limit: dict[int, list[tuple[int, int, list[int]]]] = {}
    for number, part in enumerate(sets):
        if part.generation is not None:
            rows = by_limit.setdefault(part.generation.max_new_tokens, [])
            rows += [(number, index, ids) for index, ids in enumerate(part.generation.prompts)]
    batches = []
    for limit, rows in by_limit.items():
        rows.sort(key=lambda row: -len(row[2]))
        for start in range(0, len(rows), prompts):
            numbers, indices, ids = zip(*rows[start : start + prompts], strict=True)
            batch = {"prompts": [list(i) for i in ids], "max_new_tokens": limit}
            batches.append({**batch, "set": torch.tensor(numbers), "index": torch.tensor(indices)})
    return batches
