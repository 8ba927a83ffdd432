"""What chance alone does to numbers over few rows: intervals of means, and what forget quality can tell."""

from typing import Any

import numpy as np
from scipy.stats import bootstrap, ks_2samp
from torch import Tensor

SIGNIFICANT = 0.05
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def interval(values: Tensor, draws: int = 1000) -> tuple[Any, Any]:
    """Bounds of the means of values `(N,)` or `(N, K)`: their 2.5 % and 97.5 % quantiles by bootstrap over the N rows.

    Numbers for `(N,)`, lists of K for `(N, K)`; the same values always give the same bounds. N is at least 2.
    """
    table = values.double().numpy()
    found = bootstrap((table,), np.mean, axis=0, n_resamples=draws, method="percentile", rng=0).confidence_interval
    return found.low.tolist(), found.high.tolist()


def forget_quality_chance(
    start: Tensor, retrained: Tensor, n: int | None = None, left: float = 0.5, draws: int = 1000
) -> dict[str, Any]:
    """What forget quality scores by chance at n rows, and how often it finds a model that did not forget some of them.

    Args:
        start: Truth ratios of the start model.
        retrained: Truth ratios of the retrained model.
        n: Rows of a test; by default as many as `retrained` has.
        left: Share of the rows that are not forgotten; a half, unless given.
        draws: Tests of each kind. Each compares two samples of n rows.

    Returns:
        `n`; `retrained`, 5 %, 50 % and 95 % quantiles of forget quality between two samples of one distribution, which
        the test does not depend on; `half`, the same between rows drawn from the retrained model and rows of which the
        share `left` is drawn from the start model; and `power`, the share of the latter tests that score below 0.05.
    """
    known, unseen = start.double().numpy(), retrained.double().numpy()
    rng, n = np.random.default_rng(0), n or len(unseen)
    few = round(left * n)
    p_values: dict[int, float] = {}

    def test(one: Any, other: Any) -> float:
        # How many more of one sample than of the other are at most some value.
        places = np.concatenate([one, other])
        counts = [np.searchsorted(np.sort(sample), places, side="right") for sample in (one, other)]
        gap = int(np.abs(counts[0] - counts[1]).max())
        # Of samples of equal size p depends on the gap alone.
        if gap not in p_values:
            p_values[gap] = float(ks_2samp(one, other).pvalue)
        return p_values[gap]

    def mixed() -> Any:
        return np.concatenate([rng.choice(known, few), rng.choice(unseen, n - few)])

    null = [test(rng.random(n), rng.random(n)) for _ in range(draws)]
    half = [test(mixed(), rng.choice(unseen, n)) for _ in range(draws)]
    quantiles = {
        model: {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
        for model, values in {"retrained": null, "half": half}.items()
    }
    return {"n": n, **quantiles, "power": float(np.mean(np.array(half) < SIGNIFICANT))}
