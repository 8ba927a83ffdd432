"""torchmetrics base classes for scores of a known set of rows.

Every process keeps the same fixed table of cells, so syncing is one gather of equal shapes, and a row that several
processes score lands in the same cell: it counts once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import Module, ModuleDict
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from simnpo_pl.metrics.chance import interval
from simnpo_pl.utils.errors import UserError


def first_seen(tables: Tensor) -> Tensor:
    """Merge the tables of several processes, each cell from the first process that saw it.

    Args:
        tables: `(world, 2, N, K)`, values and seen flags of each process.

    Returns:
        `(2, N, K)`.

    Example:
        >>> one, two = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]]]), torch.tensor([[[5.0, 7.0]], [[1.0, 1.0]]])
        >>> first_seen(torch.stack([one, two]).unsqueeze(-1)).squeeze()
        tensor([[3., 7.],
                [1., 1.]])
    """
    values, seen = tables.unbind(1)
    seen, first = seen.max(dim=0, keepdim=True)
    return torch.cat([values.gather(0, first), seen])


class RowMetric(Metric):
    """Scores of N rows x K kinds, reduced to one value a row and then to a few numbers.

    Kind 0 is the answer, 1 the paraphrase and 2 onwards the wrong answers; without a paraphrase the wrong answers are
    1 onwards. Subclasses override `row_values` and, if needed, `complete`, `aggregate` and `result_keys`. If a cell is
    scored twice, one of its scores counts; they differ by rounding at most.

    Attributes:
        feature: The score that this metric reads.
        title: How tables and reports call it; empty for its name.
        unit: Empty for a number from 0 to 1.
        rows: After `compute`: row index to value over all processes, without rows that lack a score.

    Args:
        rows: Number of rows N of the split.
        kinds: Number of kinds K that this metric reads; higher kinds of a batch are ignored.
        kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> from simnpo_pl.metrics.base import RowMetric
        >>> metric = RowMetric(rows=3)
        >>> nll = torch.tensor([1.0, 2.0, 1.0])
        >>> metric.update(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0]), {"nll": nll})
        >>> metric.compute(), metric.rows
        ({'value': 1.5, 'n': 2.0}, {0: 1.0, 1: 2.0})
    """

    feature: str = "nll"
    title: str = ""
    unit: str = ""
    higher_is_better: bool | None = None
    result_keys: tuple[str, ...] = ("value",)
    is_differentiable = False
    full_state_update = False
    table: Tensor

    def __init__(self, rows: int, kinds: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if rows < 1 or kinds < 1:
            raise UserError(f"{type(self).__name__}: expected a row and kind at least, got rows={rows}, kinds={kinds}")
        self.kinds = kinds
        self.rows: dict[int, float] = {}
        self.add_state("table", torch.zeros(2, rows, kinds), dist_reduce_fx=first_seen)

    def update(self, index: Tensor, kind: Tensor, scores: Mapping[str, Tensor]) -> None:
        """Store the scores of one batch.

        Args:
            index: `(B,)` row numbers within the split.
            kind: `(B,)` which answer of the row was scored.
            scores: Name to `(B,)` scores; only `feature` is read.
        """
        device = self.table.device
        index, kind = index.long().to(device), kind.long().to(device)
        used = kind < self.kinds
        # A copy, because a table that was reset in inference mode cannot be written to outside of it.
        table = self.table.clone()
        table[0, index[used], kind[used]] = scores[self.feature].detach().to(table)[used]
        table[1, index[used], kind[used]] = 1
        self.table = table

    @final
    def compute(self) -> dict[str, float]:
        """Reduce all processes' rows; also fills `rows`.

        Returns:
            The entries of `aggregate`, "value" among them, and "n", the number of rows behind them. Rows that lack a
            score are left out; a NaN score makes the value NaN. Without any row the values are NaN and n is 0.
        """
        values, flags = self.table.detach().cpu().double().unbind(0)
        seen = flags > 0
        complete = self.complete(seen)
        kept = self.row_values(values, seen)[complete]
        self.rows = dict(zip(complete.nonzero().flatten().tolist(), kept.tolist(), strict=True))
        result = self.aggregate(kept) if self.rows else dict.fromkeys(self.result_keys, math.nan)
        return {**result, "n": float(len(self.rows))}

    def complete(self, seen: Tensor) -> Tensor:
        """Which rows have every score they need: `(N, K)` bool to `(N,)` bool; by default all kinds."""
        return seen.all(dim=1)

    def row_values(self, values: Tensor, seen: Tensor) -> Tensor:
        """One value a row, by default the first kind's score.

        Args:
            values: `(N, K)` float64 scores, 0 where not seen.
            seen: `(N, K)` bool.

        Returns:
            `(N,)` float64; entries of incomplete rows are not used.
        """
        return values[:, 0]

    def averaged(self, row_values: Tensor) -> Tensor:
        """The `(n,)` values whose mean `aggregate` takes by default: the rows' own."""
        return row_values

    def aggregate(self, row_values: Tensor) -> dict[str, float]:
        """Reduce the `(n,)` float64 values of the complete rows, n > 0, to the entries of `result_keys`."""
        return {"value": self.averaged(row_values).mean().item()}

    def interval(self) -> tuple[float, float] | None:
        """After `compute`: 95 % interval of a mean by bootstrap over rows; None of a single row or another number."""
        values = self.averaged(torch.tensor(list(self.rows.values()), dtype=torch.float64))
        if type(self).aggregate is not RowMetric.aggregate or len(values) < 2 or not values.isfinite().all():
            return None
        return interval(values)

    def reset(self) -> None:
        super().reset()
        self.rows = {}

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # NCCL gathers tensors of the GPU only.
        self.table = self.table.to(self.device)
        super()._sync_dist(*args, **kwargs)

    def _apply(self, fn: Callable, exclude_state: Sequence[str] = "") -> Module:
        # The table stays on the CPU, where an update does not wait for a GPU, and in float32: a model cast to bfloat16
        # would round the losses.
        return super()._apply(fn, exclude_state=("table", *exclude_state))


class CombinedMetric(WrapperMetric):
    """A number from several row metrics, which may be updated by themselves or through `update`, and sync themselves.

    Args:
        parts: Name, without a dot, to metric.
    """

    higher_is_better: bool | None = None
    is_differentiable = False
    full_state_update = False

    def __init__(self, parts: Mapping[str, RowMetric], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.parts: Any = ModuleDict(parts)

    def update(self, part: str, index: Tensor, kind: Tensor, scores: Mapping[str, Tensor]) -> None:
        """Pass a batch to one part, see `RowMetric.update`."""
        self.parts[part].update(index, kind, scores)

    def reset(self) -> None:
        super().reset()
        for part in self.parts.values():
            part.reset()
