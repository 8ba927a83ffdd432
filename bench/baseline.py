"""The recipe of public unlearning code, as the baseline.

Every set of rows goes through the model by itself, with its labels, padded to its longest row. Logits are taken at
every position. The reference stays in memory and scores its rows in every step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.data.training import collate
from simnpo_pl.metrics.functional import exact_memorization, extraction_strength

Batch = dict[str, Tensor]


RowLosses = Callable[[Any, Batch], tuple[Tensor, Tensor]]


def row_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss of each answer and its length, `(B,)` both.

    Public code hands the model the labels, of which this makes a mean loss that nobody reads, copies the logits for the
    shift, and has the classes in the second dimension.
    """
    logits = model(**batch, use_cache=False).logits[:, :-1].contiguous()
    labels = batch["labels"][:, 1:].contiguous()
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(dim=-1), (labels != -100).sum(dim=-1)


def lean_row_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same without that: one cross-entropy over the logits without copies."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape).sum(dim=-1), (labels != -100).sum(dim=-1)


def mean_loss(model: Any, batch: Batch) -> Tensor:
    """Loss over all answer tokens, as the model computes it from labels."""
    return model(**batch, use_cache=False).loss


def kl(model: Any, reference: Any, batch: Batch) -> Tensor:
    """Divergence KL(reference || policy) over the answers' tokens."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    with torch.no_grad():
        target = reference(**inputs).logits.log_softmax(dim=-1)
    logps = model(**inputs).logits.log_softmax(dim=-1)
    divergence = (target.exp() * (target - logps)).sum(dim=-1)[:, :-1]
    return divergence[batch["labels"][:, 1:] != -100].mean()


def npo(
    model: Any, reference: Any, forget: Batch, retain: Batch, beta: float = 0.1, of: RowLosses = row_losses
) -> Tensor:
    """NPO with cross-entropy on the retain rows."""
    return _npo(model, reference, forget, beta, of) + mean_loss(model, retain)


def npo_kl(model: Any, reference: Any, forget: Batch, retain: Batch, beta: float = 0.1) -> Tensor:
    """NPO with a divergence from the reference on the retain rows."""
    return _npo(model, reference, forget, beta) + kl(model, reference, retain)


def simnpo(
    model: Any, reference: Any, forget: Batch, retain: Batch, beta: float = 2.5, of: RowLosses = row_losses
) -> Tensor:
    """SimNPO with cross-entropy on the retain rows; needs no reference."""
    losses, lengths = of(model, forget)
    return -2 / beta * F.logsigmoid(beta * losses / lengths).mean() + mean_loss(model, retain)


def _npo(model: Any, reference: Any, forget: Batch, beta: float, of: RowLosses = row_losses) -> Tensor:
    with torch.no_grad():
        before, _ = of(reference, forget)
    now, _ = of(model, forget)
    return -2 / beta * F.logsigmoid(beta * (now - before)).mean()


@torch.no_grad()
def truth_ratio_losses(model: Any, questions: Sequence[Sequence[TokenRow]], size: int = 32) -> list[list[float]]:
    """Mean loss of every answer of every question: one pass over all questions for each of their answers."""
    columns = []
    for answers in zip(*questions, strict=True):
        column: list[float] = []
        for start in range(0, len(answers), size):
            batch = collate(answers[start : start + size])
            losses, lengths = row_losses(model, {key: value.to(model.device) for key, value in batch.items()})
            column += (losses / lengths).tolist()
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


@torch.no_grad()
def scores(model: Any, splits: Mapping[str, Sequence[Sequence[TokenRow]]], size: int = 32) -> dict[str, Any]:
    """Mean losses of every split's answers; of the forget rows also extraction strength and exact memorization.

    As public code does it, each metric makes its own passes.
    """
    losses: dict[str, Any] = {name: truth_ratio_losses(model, questions, size) for name, questions in splits.items()}
    first = [answers[0] for answers in splits["forget"]]
    starts = range(0, len(first), size)
    for name, of in (("exact_memorization", exact_memorization), ("extraction_strength", extraction_strength)):
        chunks = [_hits(model, collate(first[start : start + size])) for start in starts]
        losses[name] = [of(hits) for chunk in chunks for hits in chunk]
    return losses


def _hits(model: Any, batch: Batch) -> list[Tensor]:
    """Whether each token of an answer, its end left out, is the most probable one."""
    logps = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(dim=-1)
    labels = batch["labels"][:, 1:]
    best = logps[:, :-1].argmax(dim=-1)
    return [(b == own)[own != -100][:-1] for b, own in zip(best, labels, strict=True)]


class _Ends(LogitsProcessor):
    """Ends each row of a batch after its own number of tokens."""

    def __init__(self, lengths: Sequence[int], eos: int, start: int) -> None:
        self.lengths, self.eos, self.start = torch.tensor(lengths), eos, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ended = input_ids.shape[1] - self.start >= self.lengths
        scores[:, self.eos] = torch.where(ended, torch.inf, -torch.inf)
        return scores


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[list[int]], lengths: Sequence[int], eos: int, size: int = 16
) -> list[list[int]]:
    """Greedy answers of given lengths by transformers, in the order of the rows, padded on the left."""
    answers = []
    for start in range(0, len(prompts), size):
        chosen, ends = prompts[start : start + size], lengths[start : start + size]
        width = max(len(prompt) for prompt in chosen)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in chosen])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chosen])
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(lengths) + 1,
            logits_processor=LogitsProcessorList([_Ends(ends, eos, width)]),
            eos_token_id=eos,
            pad_token_id=0,
        )
        answers += [row[:end] for row, end in zip(output[:, width:].tolist(), ends, strict=True)]
    return answers
