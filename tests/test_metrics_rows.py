"""Row metrics: repeats, missing rows, NaN, several processes, and use as ordinary torchmetrics."""

import math
import pickle

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing import spawn

from simnpo_pl.metrics import functional as F
from simnpo_pl.metrics.answers import (
    AnswerProbability,
    Balance,
    ChoiceProbability,
    ForgetQuality,
    ModelUtility,
    RowMean,
    TruthRatio,
)
from simnpo_pl.metrics.base import RowMetric
from simnpo_pl.utils.errors import UserError

ROWS, KINDS = 7, 4


def table(rows: int = ROWS, kinds: int = KINDS) -> torch.Tensor:
    return torch.rand(rows, kinds, generator=torch.Generator().manual_seed(3)) * 3


def feed(metric: RowMetric, values: torch.Tensor, rows: list[int]) -> None:
    index = torch.tensor(rows).repeat_interleave(values.shape[1])
    kind = torch.arange(values.shape[1]).repeat(len(rows))
    metric.update(index, kind, {metric.feature: values[index, kind]})


def every_metric() -> list[RowMetric]:
    retrained = torch.linspace(0.3, 2.0, ROWS)
    return [
        AnswerProbability(ROWS),
        AnswerProbability(ROWS, kind=1),
        ChoiceProbability(ROWS, KINDS),
        RowMean("nll", ROWS),
        TruthRatio(ROWS, KINDS),
        TruthRatio(ROWS, KINDS, "arithmetic", "utility", has_paraphrase=False),
        TruthRatio(ROWS, KINDS, "prob_mean"),
        ForgetQuality(ROWS, KINDS, retrained),
    ]


METRICS = pytest.mark.parametrize("which", range(len(every_metric())))


def test_values_are_those_of_the_functions():
    values = table()
    wide = values.double()
    ratio = F.truth_ratio(wide[:, 1], wide[:, 2:])
    direct = F.truth_ratio(wide[:, 0], wide[:, 1:], "arithmetic")
    quality = F.forget_quality(ratio, torch.linspace(0.3, 2.0, ROWS))
    expected = [
        F.answer_probability(wide[:, 0]).mean(),
        F.answer_probability(wide[:, 1]).mean(),
        F.choice_probability(wide[:, 0], wide[:, 1:]).mean(),
        wide[:, 0].mean(),
        F.forget_truth_ratio(ratio),
        F.utility_truth_ratio(direct),
        F.truth_ratio(wide[:, 1], wide[:, 2:], "prob_mean").mean(),
        quality.p_value,
    ]
    for metric, value in zip(every_metric(), expected, strict=True):
        feed(metric, values, list(range(ROWS)))
        assert metric.compute()["value"] == pytest.approx(float(value))
        assert metric.compute()["n"] == ROWS
    assert metric.compute()["ks_statistic"] == quality.ks_statistic
    assert metric.rows == pytest.approx(dict(enumerate(ratio.tolist())))


@METRICS
def test_use_as_a_torchmetric(which):
    """Repeats change nothing; pickling, a change of dtype, `forward` and `reset` behave as anywhere."""
    metric = every_metric()[which]
    feed(metric, table(), list(range(ROWS)))
    expected = metric.compute()
    feed(metric, table(), [2, 2, 0])
    assert metric.compute() == expected
    copy = pickle.loads(pickle.dumps(metric)).to(torch.bfloat16).to("cpu")
    assert copy.table.dtype == torch.float32
    assert copy.compute() == expected
    metric.reset()
    assert metric.rows == {}
    index, kind = torch.arange(ROWS).repeat_interleave(KINDS), torch.arange(KINDS).repeat(ROWS)
    metric(index[:9], kind[:9], {"nll": table()[index, kind][:9]})
    metric(index, kind, {"nll": table()[index, kind]})
    assert metric.compute() == expected


@METRICS
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_rows_give_nan(which):
    metric = every_metric()[which]
    result = metric.compute()
    assert math.isnan(result["value"])
    assert result["n"] == 0


@METRICS
def test_a_nan_score_is_not_dropped(which):
    metric = every_metric()[which]
    values = table()
    values[3, :3] = math.nan
    feed(metric, values, list(range(ROWS)))
    result = metric.compute()
    assert math.isnan(result["value"])
    assert result["n"] == ROWS
    assert math.isnan(metric.rows[3])


def test_incomplete_rows_are_left_out():
    metric = TruthRatio(3, 3)
    metric.update(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 1, 0]), {"nll": torch.ones(4)})
    assert metric.compute() == {"value": 1.0, "n": 1.0}
    assert metric.rows == {0: 1.0}


def test_forget_quality_compares_the_same_rows_only():
    """Rows 0 and 1 of each side: all of one above all of the other, p = 2 / C(4, 2) = 1/3."""
    metric = ForgetQuality(3, 2, torch.tensor([5.0, 6.0, 0.1]), has_paraphrase=False)
    feed(metric, torch.ones(3, 2), [0, 1])
    result = metric.compute()
    assert result["value"] == pytest.approx(1 / 3)
    assert (result["n"], result["m"]) == (2, 2)


def test_update_after_a_reset_in_inference_mode():
    metric = RowMean("nll", 2)
    with torch.inference_mode():
        metric.reset()
    metric.update(torch.tensor([0]), torch.tensor([0]), {"nll": torch.tensor([2.0], requires_grad=True)})
    assert metric.compute()["value"] == 2.0


def test_constructor_errors():
    with pytest.raises(UserError, match="got rows=0"):
        AnswerProbability(0)
    with pytest.raises(UserError, match="got 'harmonic' and 'forget'"):
        TruthRatio(2, 3, "harmonic")
    with pytest.raises(UserError, match="got 'geometric' and 'both'"):
        TruthRatio(2, 3, aggregate="both")
    with pytest.raises(UserError, match="at least 3 kinds, got 2"):
        TruthRatio(2, 2)
    with pytest.raises(UserError, match=r"expected 2 truth ratios .* got shape \(3,\)"):
        ForgetQuality(2, 3, torch.ones(3))


def test_model_utility():
    """Parts 1 and 1/2: 2 / (1 + 2) = 2/3; NaN while a part has no row."""
    shared = RowMean("s", 1)
    metric = ModelUtility({"retain/rouge": shared, "facts/rouge": RowMean("s", 1)})
    zero = torch.tensor([0])
    shared.update(zero, zero, {"s": torch.tensor([1.0])})
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(metric.compute()["value"])
    metric.update("facts/rouge", zero, zero, {"s": torch.tensor([0.5])})
    metric = pickle.loads(pickle.dumps(metric)).to("cpu")
    result = metric.compute()
    assert result == {"value": pytest.approx(2 / 3), "n": 2}
    metric.reset()
    assert not metric.parts["retain/rouge"].table.any()


def test_balance():
    """Knowledge 50 of what is kept, and 100 - 75 lacking of what is forgotten: 2 / (1/50 + 1/25) = 100/3."""
    parts = [RowMean("s", 1, scale=100), RowMean("s", 1, scale=100)]
    for part, score in zip(parts, (0.5, 0.75), strict=True):
        part.update(torch.tensor([0]), torch.tensor([0]), {"s": torch.tensor([score])})
    result = Balance(keep=parts[:1], forget=parts[1:], largest=100).compute()
    assert (result["value"], result["n"]) == (pytest.approx(100 / 3), 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, ROWS - 1), max_size=9), min_size=1, max_size=4), st.data())
def test_any_split_over_processes_equals_one_process(shares, data):
    """Shares may overlap, repeat rows and leave some out; what counts is the rows seen anywhere."""
    values = table()
    if data.draw(st.booleans()):
        values[data.draw(st.integers(0, ROWS - 1)), 2] = math.nan
    make = lambda **options: ForgetQuality(ROWS, KINDS, torch.linspace(0.3, 2.0, ROWS), **options)  # noqa: E731
    processes = [make() for _ in shares]
    for metric, share in zip(processes, shares, strict=True):
        feed(metric, values, share or [0])
    single = make()
    feed(single, values, [row for share in shares for row in share or [0]])
    tables = [metric.table for metric in processes]
    synced = make(dist_sync_fn=lambda state, group: tables, distributed_available_fn=lambda: True)
    feed(synced, values, shares[0] or [0])
    assert synced.compute() == pytest.approx(single.compute(), nan_ok=True)
    assert synced.rows == pytest.approx(single.rows, nan_ok=True)
    assert torch.equal(synced.table[1], processes[0].table[1])  # syncing leaves the own state as it was


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metrics = [AnswerProbability(ROWS), ForgetQuality(ROWS, KINDS, torch.linspace(0.3, 2.0, ROWS))]
    share = list(range(rank, ROWS, 2))
    share += [0] * (4 - len(share))  # as a distributed sampler fills the shorter share
    for metric in metrics:
        feed(metric, table(), share)
    torch.save([(metric.compute(), metric.rows) for metric in metrics], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    spawn(_process, args=(str(tmp_path),), nprocs=2)
    for position, metric in enumerate([every_metric()[0], every_metric()[-1]]):
        feed(metric, table(), list(range(ROWS)))
        expected = (metric.compute(), metric.rows)
        assert all(torch.load(tmp_path / f"{rank}.pt")[position] == expected for rank in range(2))
