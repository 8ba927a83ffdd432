"""Mixtures of Markov chains: a forgetting problem whose right answer is known (SimNPO paper, section 5).

The retain chain owns states 0 to 2, forget1 3 to 5, forget2 6 to 8; no chain owns state 9. A state alone does not say
which chain a sequence came from, so a model has to find out from the sequence. Sequences of forget1 and forget2 are
forgotten.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from simnpo_pl.benchmarks.base import PairedData
from simnpo_pl.benchmarks.pretraining import batches_of, new_llama, train
from simnpo_pl.data.tokenization import IGNORE_INDEX, TokenRow
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.plan import Split
from simnpo_pl.metrics.answers import RowMean
from simnpo_pl.models.loading import save_model
from simnpo_pl.models.logprobs import AnswerStates, divergence
from simnpo_pl.utils.errors import UserError
from simnpo_pl.utils.files import read_json, write_json

STATES, OWNED, LEAKAGE = 10, 3, 0.2
CHAINS = ("retain", "forget1", "forget2")
LENGTH = 20
"""States of a sequence; those of forget2 may be shorter."""
DISTANCE = "distance"
BATCH = 128
TRAIN_SHARE = 0.8
Array = NDArray[np.float64]
INITIAL = np.full((len(CHAINS), STATES), LEAKAGE / (STATES - OWNED))
"""`(chains, STATES)`, law of a sequence's first state: 1 - LEAKAGE spread over the chain's own states."""
TRANSITIONS = np.full((len(CHAINS), STATES, STATES), 1 / STATES)
"""`(chains, STATES, STATES)`, laws of the next state: the initial law in the chain's own states, uniform in others."""
for _chain in range(len(CHAINS)):
    _own = slice(_chain * OWNED, (_chain + 1) * OWNED)
    INITIAL[_chain, _own] = (1 - LEAKAGE) / OWNED
    TRANSITIONS[_chain, _own] = INITIAL[_chain]


@dataclass(frozen=True)
class Size:
    """Size of a study, of its Llama and of the pretraining.

    Args:
        sequences: Of all chains together; half are retain, a quarter each forget1 and forget2.
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


class MarkovData(PairedData):
    """Sequences of the three chains, and models that know them, made in `path` unless it has those of these settings.

    The start model is `path`/start, the retrained one, which saw only the retain chain, `path`/retrained. The metric
    of each chain is the mean KL(true transition row || model), in nats: small is known, large is forgotten.

    Args:
        path: Folder for the models.
        forget2_length: States of a forget2 sequence, 2 to 20; all other sequences have 20.
        knows_forget2: Whether the start model has seen forget2; null says yes where these sequences are short, as in
            the paper's figures.
        size: `small`, which runs in seconds, or `paper`.
        kwargs: Passed on to `PairedData`.
    """

    def __init__(
        self,
        path: str = "runs/markov-data",
        forget2_length: int = 5,
        knows_forget2: bool | None = None,
        size: Literal["small", "paper"] = "small",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 2 <= forget2_length <= LENGTH:
            raise UserError(f"--data.forget2_length must be between 2 and {LENGTH}, got {forget2_length}")
        self.path = Path(path).expanduser()
        self.forget2_length = forget2_length
        self.knows_forget2 = forget2_length < LENGTH if knows_forget2 is None else knows_forget2
        self.size = SIZES[size]

    def prepare_data(self) -> None:
        """Makes the models once; other processes that share the folder wait."""
        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            prepare(self.path, self.size, self.forget2_length, self.knows_forget2, self.seed)

    def token_rows(self, parts: Collection[str]) -> dict[str, list[TokenRow]]:
        """Sequences of both forget chains, and of the retain chain."""
        if {"alternate", "sampled"} & set(parts):
            raise UserError("sequences of states have no refusals and no questions; choose another objective")
        known = sequences(self.size, self.forget2_length, self.seed, train=True)
        known["forget"] = known["forget1"] + known["forget2"]
        return {name: known[name] for name in parts}

    def make_evaluation(self) -> Evaluation:
        """Distance to the true chain on unseen sequences of each."""
        splits = []
        for name, rows in sequences(self.size, self.forget2_length, self.seed, train=False).items():
            texts = [{"question": "", "answer": " ".join(map(str, row.input_ids))} for row in rows]
            distance = RowMean(DISTANCE, len(rows))
            splits.append(Split(name, texts, [[row] for row in rows], {f"{name}/{DISTANCE}": distance}))
        return MarkovEvaluation(splits, {}, {}, str)


class MarkovEvaluation(Evaluation):
    """Scores sequences by their distance to the true chain instead of by their loss."""

    def score(self, states: AnswerStates, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean KL(true row || model) of each sequence, `(B,)` nats."""
        # Position t predicts the state at t + 1, given the one at t.
        scored = batch["labels"][:, 1:] >= 0
        current = batch["input_ids"][:, :-1][scored]
        logits = states.logits()
        laws = torch.as_tensor(TRANSITIONS, dtype=torch.float32, device=logits.device)
        chains = torch.tensor([CHAINS.index(split.name) for split in self.splits], device=logits.device)
        true = laws[chains[batch["split"]][states.rows], current]
        return {DISTANCE: states.sum_rows(divergence(true.log(), logits)) / states.lengths()}


def sample(chain: int, count: int, length: int, seed: int) -> NDArray[np.int64]:
    """Sequences of a chain, `(count, length)`.

    Each chain has its own generator: its sequences do not depend on the number and length of another chain's.
    """
    draws = np.random.default_rng([seed, chain]).random((length, count))
    states = np.empty((count, length), dtype=np.int64)
    laws: Array = np.tile(INITIAL[chain], (count, 1))
    for step in range(length):
        # By inversion of the laws (count, STATES).
        drawn = (laws.cumsum(axis=1) < draws[step][:, None]).sum(axis=1)
        states[:, step] = np.minimum(drawn, STATES - 1)
        laws = TRANSITIONS[chain][states[:, step]]
    return states


def sequences(size: Size, forget2_length: int, seed: int, train: bool) -> dict[str, list[TokenRow]]:
    """Training or test sequences of every chain; every state but the first is scored.

    Those of retain and forget1 do not depend on `forget2_length`.
    """
    found = {}
    for number, name in enumerate(CHAINS):
        count = size.sequences // (2 if name == "retain" else 4)
        states = sample(number, count, forget2_length if name == "forget2" else LENGTH, seed)
        cut = round(TRAIN_SHARE * count)
        part = states[:cut] if train else states[cut:][: size.test_rows]
        found[name] = [TokenRow(row, [IGNORE_INDEX, *row[1:]]) for row in part.tolist()]
    return found


def prepare(folder: Path, size: Size, forget2_length: int, knows_forget2: bool, seed: int) -> None:
    """Writes the models `start` and `retrained`, see `MarkovData`, unless the folder has those of these settings."""
    known = sequences(size, forget2_length, seed, train=True)
    settings = {**asdict(size), "forget2_length": forget2_length, "knows_forget2": knows_forget2, "seed": seed}
    for name, chains in {"start": CHAINS if knows_forget2 else CHAINS[:2], "retrained": CHAINS[:1]}.items():
        marker = folder / name / "settings.json"
        if marker.is_file() and read_json(marker) == settings:
            continue
        model = new_llama(
            seed,
            vocab_size=STATES,
            hidden_size=size.width,
            intermediate_size=2 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=LENGTH,
            initializer_range=1 / size.width**0.5,
            tie_word_embeddings=False,
        )
        rows = [row for chain in chains for row in known[chain]]
        generator = np.random.default_rng(seed)
        orders = [generator.permutation(len(rows)).tolist() for _ in range(size.epochs)]
        train(model, batches_of(rows, orders, BATCH), lr=size.lr)
        save_model(model, None, folder / name)
        write_json(marker, settings)


def bayes_floors(weights: Array, length: int, count: int = 4000, seed: int = 0) -> dict[str, float]:
    """Mean KL(true row || best prediction) of each chain, nats: what no model trained on a mixture can go below.

    The best prediction weighs the chains' rows by their posterior probability given the sequence so far. `weights`
    `(chains,)` are the chains' shares in the mixture, `length` is that of forget2, `count` sequences of each are drawn.
    """
    with np.errstate(divide="ignore"):
        prior = np.log(weights / weights.sum())
    floors = {}
    for number, name in enumerate(CHAINS):
        states = sample(number, count, length if name == "forget2" else LENGTH, seed)
        now, following = states[:, :-1], states[:, 1:]
        # Of the prefix up to the current state, under each chain: (chains, count, length - 1).
        steps = np.log(TRANSITIONS[:, now[:, :-1], following[:, :-1]])
        first = np.log(INITIAL)[:, states[:, :1]]
        seen = np.concatenate([first, steps], axis=2).cumsum(axis=2) + prior[:, None, None]
        posterior = np.exp(seen - seen.max(axis=0))
        posterior /= posterior.sum(axis=0)
        predicted = np.einsum("cnt,cnts->nts", posterior, TRANSITIONS[:, now])
        true = TRANSITIONS[number][now]
        floors[name] = float((true * np.log(true / predicted)).sum(axis=2).mean())
    return floors
