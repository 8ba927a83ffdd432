"""Rows and models to measure with: random tokens of TOFU's lengths, or TOFU's own rows; untrained Llamas."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from simnpo_pl.data.tokenization import IGNORE_INDEX, PromptTemplate, TokenRow
from simnpo_pl.data.training import collate

PERCENTS = [0, 5, 10, 25, 50, 75, 90, 95, 99, 100]
PROMPT_LENGTHS = [10, 15, 17, 18, 21, 24, 28, 31, 37, 56]
ANSWER_LENGTHS = [6, 16, 20, 27, 35, 43, 51, 56, 65, 95]
"""Tokens of TOFU's 4,000 rows, by SmolLM2's tokenizer, at these percentiles; the EOS is counted with the answer."""

COMMON_START = 0.67
"""A perturbed answer begins as the paraphrase does, for up to this part of its tokens: then rows have as many distinct
beginnings as TOFU's forget10_perturbed."""

SEED = 4
"""With it, the first 8 + 8 rows are like TOFU's on average: 57 tokens, 62 % of them answers, a quarter of padding."""

Batch = dict[str, Tensor]


def model_of(
    vocabulary: int = 49152, width: int = 512, layers: int = 8, seed: int = 0, positions: int = 4096, **shape: int
) -> LlamaForCausalLM:
    """An untrained Llama with tied embeddings; 58.7 million parameters by default."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": positions,
        **shape,
    }
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, tie_word_embeddings=True, **sizes
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


def real_model(layers: int = 30) -> LlamaForCausalLM:
    """An untrained model of SmolLM2-135M's shape: 134.5 million parameters."""
    return model_of(width=576, layers=layers, intermediate_size=1536, num_key_value_heads=3)


class Rows:
    """Rows to train on and questions to evaluate.

    Args:
        vocabulary: Size of the model's vocabulary; random tokens are below it.
        data: Folder with TOFU's JSON-lines files; None draws random tokens.
        tokenizer: Folder of the tokenizer for these files.
    """

    def __init__(self, vocabulary: int, data: str | None = None, tokenizer: str | None = None) -> None:
        self.vocabulary = vocabulary
        self.data = data
        self.random = np.random.default_rng(SEED)
        if data is not None:
            from simnpo_pl.data.sources import load_split
            from simnpo_pl.models.loading import load_tokenizer

            assert tokenizer is not None
            self.encoder = PromptTemplate(load_tokenizer(tokenizer), "Question: {question}\nAnswer: {answer}")
            self.load = partial(load_split, data)

    def training(self, count: int) -> list[TokenRow]:
        """Questions with their answers."""
        if self.data is None:
            return [self._row(self._length(PROMPT_LENGTHS), self._length(ANSWER_LENGTHS)) for _ in range(count)]
        rows = self.load("full", ["question", "answer"])
        chosen = self.random.choice(len(rows), count, replace=False)
        return self.encoder.encode_rows([(rows[i]["question"], rows[i]["answer"]) for i in chosen], "full")

    def questions(self, count: int, answers: int = 6) -> list[list[TokenRow]]:
        """Questions with one paraphrased and five perturbed answers each; with 7, the answer itself comes first."""
        if self.data is None:
            return [self._question(answers) for _ in range(count)]
        columns = ["question", "answer", "paraphrased_answer", "perturbed_answer"]
        rows = self.load("forget10_perturbed", columns)[:count]
        texts = [(row["answer"], row["paraphrased_answer"], *row["perturbed_answer"])[-answers:] for row in rows]
        pairs = zip(rows, texts, strict=True)
        return [self.encoder.encode_rows([(row["question"], t) for t in own], "forget10") for row, own in pairs]

    def facts(self, count: int) -> list[list[TokenRow]]:
        """Short questions with one right and three wrong answers each."""
        if self.data is None:
            return [self._question(4, *self.random.integers((10, 3), (18, 7)).tolist()) for _ in range(count)]
        rows = self.load("world_facts_perturbed", ["question", "answer", "perturbed_answer"])[:count]
        texts = [(row["answer"], *row["perturbed_answer"]) for row in rows]
        pairs = zip(rows, texts, strict=True)
        return [self.encoder.encode_rows([(row["question"], t) for t in own], "world_facts") for row, own in pairs]

    def of_length(self, answer: int, prompt: int = 24, count: int = 1) -> list[TokenRow]:
        """Rows of one length."""
        return [self._row(prompt, answer) for _ in range(count)]

    def _question(self, count: int, prompt_length: int = 0, answer_length: int = 0) -> list[TokenRow]:
        prompt = self._tokens(prompt_length or self._length(PROMPT_LENGTHS))
        first = self._tokens(answer_length or self._length(ANSWER_LENGTHS))
        answers = [first]
        for _ in range(count - 1):
            common = int(len(first) * self.random.uniform(0, COMMON_START))
            answers.append(first[:common] + self._tokens(len(first) - common))
        return [TokenRow(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer) for answer in answers]

    def _row(self, prompt: int, answer: int) -> TokenRow:
        ids = self._tokens(prompt + answer)
        return TokenRow(ids, [IGNORE_INDEX] * prompt + ids[prompt:])

    def _tokens(self, count: int) -> list[int]:
        return self.random.integers(5, self.vocabulary, count).tolist()

    def _length(self, at_percents: list[int]) -> int:
        return round(float(np.interp(self.random.uniform(0, 100), PERCENTS, at_percents)))


def batch_of(rows: Sequence[TokenRow]) -> Batch:
    """Rows padded on the right."""
    return collate(rows)


def scored(*batches: Batch) -> int:
    """Scored tokens."""
    return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)


def freeze(model: Any) -> Any:
    """A model as a frozen reference."""
    return model.requires_grad_(False).eval()
