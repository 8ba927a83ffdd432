"""Fluency: how sure a text classifier is that a generated answer is language and not gibberish."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from simnpo_pl.models.loading import find_model, quiet_loading
from simnpo_pl.utils.errors import UserError

FLUENCY = "fluency"
OPTION = "--eval.fluency_classifier"
LONGEST = 512
"""Tokens of a text that are read, where the classifier does not take fewer."""


class FluencyClassifier:
    """Probability that a classifier gives one of its labels.

    Args:
        name: Hub id or folder of a sequence classifier with safetensors weights and tokenizer.
        label: The label of fluent text.
        batch: Texts classified together.

    Raises:
        UserError: The classifier cannot be loaded or has no such label.
    """

    def __init__(self, name: str, label: str, batch: int = 32) -> None:
        self.model, self.tokenizer = _load(name)
        labels = {number: str(text) for number, text in self.model.config.id2label.items()}
        found = [number for number, text in labels.items() if text == label]
        if not found:
            raise UserError(
                f"{OPTION} {name} has no label {label!r}, its labels are {', '.join(labels.values())}: "
                "name the one of fluent text by --eval.fluency_label"
            )
        self.label = found[0]
        self.batch = batch
        self.device = torch.device("cpu")
        positions = getattr(self.model.config, "max_position_embeddings", LONGEST)
        self.longest = int(min(LONGEST, positions, self.tokenizer.model_max_length))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Probability of the label for each text, 0 to 1; 0 for a text without a token."""
        self.model.to(self.device)
        scores: list[float] = []
        for start in range(0, len(texts), self.batch):
            some = list(texts[start : start + self.batch])
            # One by one where nothing fills rows up.
            parts = [some] if self.tokenizer.pad_token_id is not None else [[text] for text in some]
            for part in parts:
                scores += self._classify(part)
        return scores

    def _classify(self, texts: list[str]) -> list[float]:
        encoded = self.tokenizer(
            texts, return_tensors="pt", padding=len(texts) > 1, truncation=True, max_length=self.longest
        ).to(self.device)
        if not encoded["input_ids"].numel():
            return [0.0] * len(texts)
        with torch.autocast(self.device.type, enabled=False):
            logits = self.model(**encoded).logits.float()
        probabilities = logits.softmax(dim=-1)[:, self.label]
        return probabilities.masked_fill(encoded["attention_mask"].sum(dim=1) == 0, 0.0).tolist()


@cache
def _load(name: str) -> tuple[Any, Any]:
    """Classifier and tokenizer; an evaluation may be set up more than once."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    resolved = find_model(name, OPTION)
    quiet_loading()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            resolved, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(resolved)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{OPTION}: {name} is no text classifier that can be loaded ({reason})") from error
    if found["missing_keys"]:
        raise UserError(
            f"{OPTION}: {name} lacks weights of a text classifier ({min(found['missing_keys'])}); give a trained one"
        )
    return model.eval(), tokenizer
