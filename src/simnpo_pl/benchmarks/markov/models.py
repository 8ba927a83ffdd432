"""Data, start model and retrained model of one Markov-chain setting."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simnpo_pl.benchmarks.markov.process import CHAINS, LENGTH, STATES, sample
from simnpo_pl.data.collate import collate
from simnpo_pl.data.tokenization import IGNORE_INDEX, TokenRow
from simnpo_pl.models.loading import save_model
from simnpo_pl.models.logprobs import Scorer

BATCH = 128
TRAIN_SHARE = 0.8


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Args:
        sequences: Of all chains together; half are retain, a quarter each forget1 and forget2.
        width: Hidden width of the Llama.
        layers: Its layers.
        heads: Its attention heads.
        epochs: Of pretraining.
        lr: Learning rate of pretraining, constant.
        test_rows: Sequences of each chain that are evaluated.
    """

    sequences: int = 4000
    width: int = 32
    layers: int = 1
    heads: int = 1
    epochs: int = 4
    lr: float = 2e-3
    test_rows: int = 200


SIZES = {
    "small": Size(),
    "paper": Size(sequences=20000, width=128, layers=4, heads=4, epochs=5, lr=5e-4, test_rows=1000),
}
SizeName = Literal["small", "paper"]


def token_row(states: list[int]) -> TokenRow:
    """A sequence; every state but the first is scored."""
    return TokenRow(states, [IGNORE_INDEX, *states[1:]])


def rows(size: Size, forget2_length: int, seed: int, train: bool) -> dict[str, list[TokenRow]]:
    """Training or test sequences of every chain.

    Args:
        size: How many.
        forget2_length: States of a forget2 sequence.
        seed: Of the draw; retain and forget1 are the same for every length of forget2.
        train: Whether the first part is meant, to train on, or the rest.
    """
    found = {}
    for number, name in enumerate(CHAINS):
        count = size.sequences // (2 if name == "retain" else 4)
        states = sample(number, count, forget2_length if name == "forget2" else LENGTH, seed)
        cut = round(TRAIN_SHARE * count)
        part = states[:cut] if train else states[cut:][: size.test_rows]
        found[name] = [token_row(sequence) for sequence in part.tolist()]
    return found


def pretrain(size: Size, sequences: list[TokenRow], seed: int) -> LlamaForCausalLM:
    """A model trained on sequences by their cross-entropy, in eval mode.

    Args:
        size: Of model and training.
        sequences: What to learn.
        seed: Of weights and order.
    """
    config = LlamaConfig(
        vocab_size=STATES,
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=LENGTH,
        # The library's 0.02 is meant for wide models.
        initializer_range=1 / size.width**0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr, weight_decay=0.0, fused=True)
    scorer = Scorer(model)
    generator = np.random.default_rng(seed)
    model.train()
    for _ in range(size.epochs):
        order = generator.permutation(len(sequences)).tolist()
        for start in range(0, len(order), BATCH):
            batch = collate([sequences[index] for index in order[start : start + BATCH]], pad_id=0)
            loss = -scorer({"rows": batch})["rows"].token_logps().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def prepare(folder: Path, size: Size, forget2_length: int, knows_forget2: bool, seed: int) -> None:
    """Write the models `start` and `retrained` into a folder, unless they are there.

    Args:
        folder: Where.
        size: Of the study.
        forget2_length: States of a forget2 sequence.
        knows_forget2: Whether the start model has seen forget2.
        seed: Of data, weights and order.
    """
    train = rows(size, forget2_length, seed, train=True)
    seen = {"start": CHAINS if knows_forget2 else CHAINS[:2], "retrained": CHAINS[:1]}
    for name, chains in seen.items():
        if not (folder / name / "model.safetensors").is_file():
            sequences = [row for chain in chains for row in train[chain]]
            folder.mkdir(parents=True, exist_ok=True)
            save_model(pretrain(size, sequences, seed), None, folder / name)
