"""What chance alone does to numbers over few rows: intervals of means, and what forget quality can tell."""

from typing import Any

import numpy as np
from scipy.stats import bootstrap, ks_2samp
from torch import Tensor

SIGNIFICANT = 0.05
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def interval(values: Tensor, draws: int = 1000) -> tuple[Any, Any]:
    """Bounds of the means of values `(N,)` or `(N, K)`: their 2.5 % and 97.5 % quantiles by bootstrap over the N rows.

    Numbers for `(N,)`, arrays `(K,)` for `(N, K)`; the same values always give the same bounds. N is at least 2.
    """
    table = values.double().numpy()
    found = bootstrap((table,), np.mean, axis=0, n_resamples=draws, method="percentile", rng=0).confidence_interval
    return found.low.tolist(), found.high.tolist()


def forget_quality_chance(start: Tensor, retrained: Tensor, n: int | None = None, draws: int = 200) -> dict[str, Any]:
    """What forget quality scores by chance at n rows, and how often it finds a model that forgot half of them.

    Args:
        start: Truth ratios of the start model.
        retrained: Truth ratios of the retrained model.
        n: Rows of a test; by default as many as `retrained` has.
        draws: Tests of each kind. Each compares two samples of n rows.

    Returns:
        `n`; `retrained`, 5 %, 50 % and 95 % quantiles of forget quality between two samples of one distribution, which
        the test does not depend on; `half`, the same between rows drawn from the retrained model and rows of which half
        are drawn from the start model; and `power`, the share of the latter tests that score below 0.05.
    """
    known, unseen = start.double().numpy(), retrained.double().numpy()
    rng, n = np.random.default_rng(0), n or len(unseen)
    null, half = [], []
    for _ in range(draws):
        null.append(ks_2samp(rng.random(n), rng.random(n)).pvalue)
        mixed = np.concatenate([rng.choice(known, n // 2), rng.choice(unseen, n - n // 2)])
        half.append(ks_2samp(mixed, rng.choice(unseen, n)).pvalue)
    found = {"retrained": null, "half": half}
    quantiles = {
        model: {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
        for model, values in found.items()
    }
    return {"n": n, **quantiles, "power": float(np.mean(np.array(half) < SIGNIFICANT))}
