from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from simnpo_pl.data.pairing import MicroBatch, PairedSampler, draw_alternate
from simnpo_pl.utils.errors import UserError


def run_all(epoch: int = 0, world_size: int = 1, **sizes: int) -> list[list[MicroBatch]]:
    """Micro-batches of an epoch, by rank."""
    samplers = [PairedSampler(world_size=world_size, rank=rank, **sizes) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
    return [list(sampler) for sampler in samplers]


def real_pairs(batches: list[MicroBatch]) -> list[tuple[int, int]]:
    return [
        (forget, retain)
        for batch in batches
        for forget, retain, real in zip(batch.forget, batch.retain, batch.real, strict=True)
        if real
    ]


sizes = st.fixed_dictionaries(
    {
        "forget_rows": st.integers(1, 60),
        "retain_rows": st.integers(1, 80),
        "per_device_batch": st.integers(1, 4),
        "seed": st.integers(0, 2**63),
    }
)


@given(sizes=sizes, world_size=st.integers(1, 5), accumulate=st.integers(1, 3), epoch=st.integers(0, 99))
def test_every_forget_row_counts_once_and_all_processes_agree(
    sizes: dict[str, int], world_size: int, accumulate: int, epoch: int
) -> None:
    effective = world_size * sizes["per_device_batch"] * accumulate
    ranks = run_all(epoch, world_size, effective_batch=effective, **sizes)
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(f for batches in ranks for f, _ in real_pairs(batches)) == list(range(sizes["forget_rows"]))

    sampler = PairedSampler(world_size=world_size, effective_batch=effective, **sizes)
    assert sampler.accumulate == accumulate
    steps = list(dict.fromkeys(batch.step_forget for batch in ranks[0]))
    assert len(steps) == -(-sizes["forget_rows"] // effective)
    for number, step in enumerate(steps):
        assert len(step) == effective or number == len(steps) - 1
        mine = [[batch for batch in batches if batch.step_forget == step] for batches in ranks]
        pairs = sorted(pair for batches in mine for pair in real_pairs(batches))
        assert pairs == sorted(zip(step, mine[0][0].step_retain, strict=True))
        assert {len(batches) for batches in mine} == {-(-len(step) // (world_size * sizes["per_device_batch"]))}
        counts = [sum(batch.real) for batches in mine for batch in batches]
        assert max(counts) - min(counts) <= 1
        assert max(counts) <= sizes["per_device_batch"]
        for batch in (batch for batches in mine for batch in batches):
            assert len(batch.forget) == len(batch.retain) == len(batch.real) >= 1
            assert all(batch.real) or (len(batch.forget) == 1 and batch.forget[0] in step)
            assert batch.step_retain == mine[0][0].step_retain


@given(sizes=sizes, multiple=st.integers(1, 3), epoch=st.integers(0, 99))
def test_pairs_of_a_step_do_not_depend_on_the_number_of_processes(
    sizes: dict[str, int], multiple: int, epoch: int
) -> None:
    effective = 4 * sizes["per_device_batch"] * multiple

    def steps(world_size: int) -> list[tuple]:
        ranks = run_all(epoch, world_size, effective_batch=effective, **sizes)
        together = [batch for batches in ranks for batch in batches]
        order = list(dict.fromkeys((batch.step_forget, batch.step_retain) for batch in together))
        return [(step, sorted(real_pairs([b for b in together if b.step_forget == step[0]]))) for step in order]

    assert steps(1) == steps(2) == steps(4)


@given(sizes=sizes, epoch=st.integers(0, 99))
def test_partners_depend_on_the_row_alone_and_spread_evenly(sizes: dict[str, int], epoch: int) -> None:
    [small] = run_all(epoch, effective_batch=sizes["per_device_batch"], **sizes)
    [large] = run_all(epoch, effective_batch=3 * sizes["per_device_batch"], **sizes)
    partners = dict(real_pairs(small))
    assert partners == dict(real_pairs(large))
    used = Counter(partners.values())
    counts = [used[row] for row in range(sizes["retain_rows"])]
    assert max(counts) - min(counts) <= 1


def test_all_retain_rows_become_partners_over_the_epochs() -> None:
    seen: set[int] = set()
    for epoch in range(100):
        [batches] = run_all(epoch, forget_rows=4, retain_rows=30, effective_batch=4, per_device_batch=4)
        seen.update(batches[0].retain)
    assert seen == set(range(30))


def test_order_and_partners_follow_seed_and_epoch() -> None:
    def pairs(seed: int, epoch: int) -> list[tuple[int, int]]:
        arguments = {"forget_rows": 40, "retain_rows": 90, "effective_batch": 8, "per_device_batch": 4}
        return real_pairs(run_all(epoch, seed=seed, **arguments)[0])

    runs = [pairs(0, 0), pairs(0, 1), pairs(1, 0), pairs(1, 1)]
    assert runs[0] == pairs(0, 0)
    assert len({tuple(run) for run in runs}) == 4
    assert len({tuple(forget for forget, _ in run) for run in runs}) == 4
    assert len({tuple(sorted(run)) for run in runs}) == 4


def test_the_draws_of_a_seed_are_pinned() -> None:
    # Recorded: another order would silently change every published run.
    [batches] = run_all(2, forget_rows=5, retain_rows=9, effective_batch=4, per_device_batch=2, seed=7)
    assert real_pairs(batches) == [(1, 4), (0, 2), (3, 8), (2, 3), (4, 7)]
    assert [draw_alternate(100, 7, row) for row in range(5)] == [53, 18, 89, 99, 72]


def test_a_last_step_smaller_than_the_processes_gets_fillers() -> None:
    ranks = run_all(0, 4, forget_rows=10, retain_rows=20, effective_batch=8, per_device_batch=2)
    assert [len(batches) for batches in ranks] == [2, 2, 2, 2]
    assert [batches[0].real for batches in ranks] == [(True, True)] * 4
    assert [batches[1].real for batches in ranks] == [(True,), (True,), (False,), (False,)]
    assert all(len(batches[1].step_forget) == 2 for batches in ranks)


def test_without_a_retain_set_nothing_is_paired() -> None:
    [[batch]] = run_all(forget_rows=3, retain_rows=0, effective_batch=4, per_device_batch=4)
    assert (batch.retain, batch.step_retain) == ((), ())
    assert sorted(batch.forget) == [0, 1, 2]


def test_global_random_state_neither_matters_nor_changes() -> None:
    arguments = {"forget_rows": 9, "retain_rows": 9, "effective_batch": 3, "per_device_batch": 3}
    before = run_all(**arguments)
    np.random.seed(1)
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert run_all(**arguments) == before
    draw_alternate(5, 0, 3)
    assert (np.random.get_state()[1] == states[0]).all()
    assert torch.equal(torch.get_rng_state(), states[1])


def test_a_data_loader_hands_micro_batches_to_the_data_set() -> None:
    class Echo(torch.utils.data.Dataset):
        def __getitem__(self, batch: MicroBatch) -> MicroBatch:
            return batch

    sampler = PairedSampler(6, 8, effective_batch=4, per_device_batch=2)
    loader = DataLoader(Echo(), sampler=sampler, batch_size=None, collate_fn=lambda batch: batch)
    assert list(loader) == list(sampler)
    assert len(loader) == 3


@pytest.mark.parametrize(
    ("effective", "per_device", "world", "message"),
    [
        (
            30,
            2,
            4,
            r"effective_batch 30 is not a multiple of 4 processes x per_device_batch 2 = 8: .* 24 or 32$",
        ),
        (32, 6, 4, r"x per_device_batch 6 = 24: set effective_batch to 24 or 48, or per_device_batch to 4$"),
        (4, 8, 1, r"= 8: set effective_batch to 8, or per_device_batch to 4$"),
    ],
)
def test_an_effective_batch_that_does_not_divide_is_refused(
    effective: int, per_device: int, world: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PairedSampler(100, 100, effective, per_device, world)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("forget_rows", 0, "forget_rows must be at least 1, got 0"),
        ("retain_rows", -1, "retain_rows must be at least 0, got -1"),
        ("effective_batch", 0, "effective_batch must be at least 1, got 0"),
        ("per_device_batch", 0, "per_device_batch must be at least 1, got 0"),
        ("world_size", 0, "world_size must be at least 1, got 0"),
        ("rank", -1, "rank must be at least 0, got -1"),
        ("rank", 1, "rank must be below world_size 1, got 1"),
        ("seed", -1, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(name: str, value: int, message: str) -> None:
    arguments = {"forget_rows": 4, "retain_rows": 4, "effective_batch": 4, "per_device_batch": 4}
    with pytest.raises(UserError, match=f"^{message}$"):
        PairedSampler(**{**arguments, name: value})


def test_alternates_are_fixed_by_seed_and_row_and_use_all_refusals() -> None:
    draws = [draw_alternate(10, 0, row) for row in range(400)]
    assert draws == [draw_alternate(10, 0, row) for row in range(400)]
    assert draws != [draw_alternate(10, 1, row) for row in range(400)]
    # 40 expected of each; five standard deviations are 30.
    assert all(10 <= count <= 70 for count in Counter(draws).values())
    assert set(draws) == set(range(10))
