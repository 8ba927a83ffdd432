"""How sure a text classifier is of a label: that an answer is language and not gibberish, or entails the true one.

Not transformers' pipeline, which fails on texts without a token and on tokenizers without a padding token.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from simnpo_pl.models.loading import find_model, quiet_loading
from simnpo_pl.utils.errors import UserError

FLUENCY = "fluency"
OPTIONS = ("--eval.fluency_classifier", "--eval.fluency_label")
LONGEST = 512
"""Tokens of a text that are read, unless the classifier takes fewer."""


class FluencyClassifier:
    """Probability that a classifier gives to one of its labels.

    Args:
        name: Hub id or folder of a sequence classifier with safetensors weights and tokenizer.
        label: The label, such as that of fluent text.
        batch: Texts classified together.
        options: Settings that name classifier and label, for messages.

    Raises:
        UserError: The classifier cannot be loaded or has no such label.
    """

    def __init__(self, name: str, label: str, batch: int = 32, options: tuple[str, str] = OPTIONS) -> None:
        self.model, self.tokenizer = _load(name, options[0])
        labels = {str(text): number for number, text in self.model.config.id2label.items()}
        if label not in labels:
            raise UserError(
                f"{options[0]} {name} has no label {label!r}, its labels are {', '.join(labels)}: "
                f"name the right one by {options[1]}"
            )
        self.label = labels[label]
        self.batch = batch if self.tokenizer.pad_token_id is not None else 1
        self.device = torch.device("cpu")
        positions = getattr(self.model.config, "max_position_embeddings", LONGEST)
        self.longest = int(min(LONGEST, positions, self.tokenizer.model_max_length))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], seconds: Sequence[str] | None = None) -> list[float]:
        """Probability of the label for each text, or each pair with the second ones; 0 for a blank one."""
        self.model.to(self.device)
        scores: list[float] = []
        for start in range(0, len(texts), self.batch):
            some = list(texts[start : start + self.batch])
            pairs = None if seconds is None else list(seconds[start : start + self.batch])
            encoded = self.tokenizer(
                some, pairs, return_tensors="pt", padding=len(some) > 1, truncation=True, max_length=self.longest
            ).to(self.device)
            if not encoded["input_ids"].numel():
                scores += [0.0] * len(some)
                continue
            with torch.autocast(self.device.type, enabled=False):
                probabilities = self.model(**encoded).logits.float().softmax(dim=-1)[:, self.label]
            # Of nothing, some tokenizers make tokens for beginning and end.
            blank = torch.tensor([not text.strip() for text in some], device=self.device)
            scores += probabilities.masked_fill(blank | (encoded["attention_mask"].sum(dim=1) == 0), 0.0).tolist()
        return scores


@cache
def _load(name: str, option: str) -> tuple[Any, Any]:
    """Classifier and tokenizer; an evaluation may be set up more than once."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    resolved = find_model(name, option)
    quiet_loading()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            resolved, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(resolved)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{option}: {name} is no text classifier that can be loaded ({reason})") from error
    if found["missing_keys"]:
        raise UserError(
            f"{option}: {name} lacks weights of a text classifier ({min(found['missing_keys'])}); give a trained one"
        )
    return model.eval(), tokenizer
