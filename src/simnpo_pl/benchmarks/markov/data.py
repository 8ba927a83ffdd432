"""Mixtures of Markov chains: sequences of two chains are forgotten, a third is retained (SimNPO paper, section 5)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simnpo_pl.benchmarks.markov.models import SIZES, SizeName, prepare, rows
from simnpo_pl.benchmarks.markov.process import CHAINS, LENGTH, TRANSITIONS
from simnpo_pl.benchmarks.paired import PairedData
from simnpo_pl.data.tokenization import TokenRow
from simnpo_pl.evaluation.evaluation import Evaluation
from simnpo_pl.evaluation.plan import EvalSet
from simnpo_pl.metrics.answers import RowMean
from simnpo_pl.models.logprobs import AnswerStates, divergence
from simnpo_pl.utils.errors import UserError

DISTANCE = "distance"


class MarkovData(PairedData):
    """Sequences of the three chains; models that know them are made in `path` unless they are there.

    The start model is `path`/start, the retrained one, which saw the retain chain alone, `path`/retrained. Measured is
    the mean KL(true transition row || model) of every chain, in nats: small is known, large is forgotten.

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
        size: SizeName = "small",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 2 <= forget2_length <= LENGTH:
            raise UserError(f"--data.forget2_length must be between 2 and {LENGTH}, got {forget2_length}")
        if size not in SIZES:
            raise UserError(f"--data.size must be one of {', '.join(SIZES)}, got {size!r}")
        self.path = Path(path).expanduser()
        self.forget2_length = forget2_length
        self.knows_forget2 = forget2_length < LENGTH if knows_forget2 is None else knows_forget2
        self.size = SIZES[size]

    def prepare_data(self) -> None:
        """Make the models once; processes that come at the same time wait for the first."""
        from filelock import FileLock

        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / ".lock"):
            prepare(self.path, self.size, self.forget2_length, self.knows_forget2, self.seed)

    def token_rows(self, parts: tuple[str, ...]) -> dict[str, list[TokenRow]]:
        """Sequences of both forget chains, and of the retain chain."""
        if "alternate" in parts:
            raise UserError("sequences of states have no refusals; take an objective that reads none")
        train = rows(self.size, self.forget2_length, self.seed, train=True)
        found = {"forget": train["forget1"] + train["forget2"], "retain": train["retain"]}
        return {name: found[name] for name in parts}

    def make_evaluation(self) -> Evaluation:
        """Distance to the true chain on unseen sequences of each."""
        test = rows(self.size, self.forget2_length, self.seed, train=False)
        sets = [
            EvalSet(
                name,
                [{"question": "", "answer": " ".join(map(str, row.input_ids))} for row in test[name]],
                [[row] for row in test[name]],
                {f"{name}/{DISTANCE}": RowMean(DISTANCE, len(test[name]))},
            )
            for name in CHAINS
        ]
        return MarkovEvaluation(sets, {}, {}, lambda ids: " ".join(map(str, ids)))


class MarkovEvaluation(Evaluation):
    """Scores sequences by their distance to the true chain instead of by their loss."""

    def score(self, states: AnswerStates, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean KL(true row || model) of each sequence, `(B,)` nats."""
        # Position t predicts the state at t + 1, given the one at t.
        scored = batch["labels"][:, 1:] >= 0
        current = batch["input_ids"][:, :-1][scored]
        logits = states.logits()
        laws = torch.as_tensor(TRANSITIONS, dtype=torch.float32, device=logits.device)
        chains = torch.tensor([CHAINS.index(part.name) for part in self.sets], device=logits.device)
        true = laws[chains[batch["set"]][states.rows], current]
        return {DISTANCE: states.sum_rows(divergence(true.log(), logits)) / states.lengths()}
