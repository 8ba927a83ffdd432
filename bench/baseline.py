"""The recipe of public unlearning code, plainly: the yardstick.

Every set of rows goes through the model by itself, padded to its longest row. Logits are taken at every position. The
reference stays in memory and scores its rows in every step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simnpo_pl.data.collate import collate
from simnpo_pl.data.tokenization import TokenRow

Batch = dict[str, Tensor]


def row_losses(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss of each answer and its length, `(B,)` both."""
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


def ga(model: Any, reference: Any, forget: Batch, retain: Batch) -> Tensor:
    """Gradient ascent on the forget rows, descent on the retain rows."""
    return -mean_loss(model, forget) + mean_loss(model, retain)


def npo(model: Any, reference: Any, forget: Batch, retain: Batch, beta: float = 0.1) -> Tensor:
    """NPO with cross-entropy on the retain rows."""
    return _npo(model, reference, forget, beta) + mean_loss(model, retain)


def npo_kl(model: Any, reference: Any, forget: Batch, retain: Batch, beta: float = 0.1) -> Tensor:
    """NPO with a divergence from the reference on the retain rows."""
    return _npo(model, reference, forget, beta) + kl(model, reference, retain)


def simnpo(model: Any, reference: Any, forget: Batch, retain: Batch, beta: float = 2.5) -> Tensor:
    """SimNPO with cross-entropy on the retain rows; needs no reference."""
    losses, lengths = row_losses(model, forget)
    return -2 / beta * F.logsigmoid(beta * losses / lengths).mean() + mean_loss(model, retain)


def _npo(model: Any, reference: Any, forget: Batch, beta: float) -> Tensor:
    with torch.no_grad():
        before, _ = row_losses(reference, forget)
    now, _ = row_losses(model, forget)
    return -2 / beta * F.logsigmoid(beta * (now - before)).mean()


@torch.no_grad()
def truth_ratio_losses(model: Any, questions: Sequence[Sequence[TokenRow]], size: int = 32) -> list[list[float]]:
    """Mean loss of every answer of every question: one pass over all questions for each of their answers."""
    columns = []
    for answers in zip(*questions, strict=True):
        column: list[float] = []
        for start in range(0, len(answers), size):
            losses, lengths = row_losses(model, collate(answers[start : start + size], 0))
            column += (losses / lengths).tolist()
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[list[int]], max_new_tokens: int, eos: Sequence[int], size: int = 16
) -> list[list[int]]:
    """Greedy answers by transformers, in the order of the rows, padded on the left."""
    answers = []
    for start in range(0, len(prompts), size):
        chosen = prompts[start : start + size]
        width = max(len(prompt) for prompt in chosen)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in chosen])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in chosen])
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(eos),
            pad_token_id=0,
        )
        for row in output[:, width:].tolist():
            end = next((i for i, token in enumerate(row) if token in eos), len(row))
            answers.append(row[:end])
    return answers
