"""The data process: three Markov chains over ten states, each at home in three of them.

The retain chain owns states 0 to 2, forget1 3 to 5, forget2 6 to 8; state 9 is nobody's. A state alone does not tell
which chain a sequence came from, so a model has to find out from the sequence.
"""

import numpy as np
from numpy.typing import NDArray

STATES, OWNED, LEAKAGE = 10, 3, 0.2
CHAINS = ("retain", "forget1", "forget2")
LENGTH = 20
"""States of a sequence; those of forget2 may be shorter."""

Array = NDArray[np.float64]


def initial(chain: int) -> Array:
    """Law of a sequence's first state, `(STATES,)`: 1 - LEAKAGE spread over the chain's own states."""
    law = np.full(STATES, LEAKAGE / (STATES - OWNED))
    law[_own(chain)] = (1 - LEAKAGE) / OWNED
    return law


def transition(chain: int) -> Array:
    """Rows of the chain, `(STATES, STATES)`: the initial law in its own states, uniform in all others."""
    rows = np.full((STATES, STATES), 1 / STATES)
    rows[_own(chain)] = initial(chain)
    return rows


def _own(chain: int) -> slice:
    return slice(chain * OWNED, (chain + 1) * OWNED)


TRANSITIONS = np.stack([transition(chain) for chain in range(len(CHAINS))])
"""`(chains, STATES, STATES)`."""


def sample(chain: int, count: int, length: int, seed: int) -> NDArray[np.int64]:
    """Sequences of a chain, `(count, length)`, all drawn step by step together.

    Each chain has a generator of its own, so the sequences of one do not depend on how many or how long another's are.
    """
    draws = np.random.default_rng([seed, chain]).random((length, count))
    states = np.empty((count, length), dtype=np.int64)
    states[:, 0] = _choose(np.tile(initial(chain), (count, 1)), draws[0])
    for step in range(1, length):
        states[:, step] = _choose(TRANSITIONS[chain][states[:, step - 1]], draws[step])
    return states


def _choose(laws: Array, draws: Array) -> NDArray[np.int64]:
    """States `(count,)` by inversion of laws `(count, STATES)`."""
    return np.minimum((laws.cumsum(axis=1) < draws[:, None]).sum(axis=1), STATES - 1)


def bayes_floors(weights: Array, length: int, count: int = 4000, seed: int = 0) -> dict[str, float]:
    """Mean KL(true row || best prediction) of each chain, nats: what no model trained on a mixture can go below.

    The best prediction weighs the chains' rows by their posterior probability given the sequence so far.

    Args:
        weights: `(chains,)` shares of the chains in the mixture; 0 leaves one out.
        length: States of a forget2 sequence.
        count: Sequences drawn for the estimate.
        seed: Of the draw.
    """
    with np.errstate(divide="ignore"):
        prior = np.log(weights / weights.sum())
    initials = np.log(np.stack([initial(chain) for chain in range(len(CHAINS))]))
    floors = {}
    for number, name in enumerate(CHAINS):
        states = sample(number, count, length if name == "forget2" else LENGTH, seed)
        now, following = states[:, :-1], states[:, 1:]
        # Of the prefix up to the current state, under each chain: (chains, count, length - 1).
        steps = np.log(TRANSITIONS[:, now[:, :-1], following[:, :-1]])
        seen = np.concatenate([initials[:, states[:, :1]], steps], axis=2).cumsum(axis=2) + prior[:, None, None]
        posterior = np.exp(seen - seen.max(axis=0))
        posterior /= posterior.sum(axis=0)
        predicted = np.einsum("cnt,cnts->nts", posterior, TRANSITIONS[:, now])
        true = TRANSITIONS[number][now]
        floors[name] = float((true * np.log(true / predicted)).sum(axis=2).mean())
    return floors
