"""A step's documents over several devices: the same in every step, each once, and about as many tokens for each."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest

from llama_ft.data.balance import SILENT, balanced, laid_out, with_silent
from llama_ft.data.order import document_order, grouped_by_length

CUTS = [(8, 4, 1), (8, 2, 2), (4, 2, 4), (2, 2, 8), (1, 4, 8), (4, 1, 8)]


def dealt(order: np.ndarray, micro_batch: int, accumulation: int, world: int) -> list[list[np.ndarray]]:
    """[step][device]: the documents that accelerate gives it; micro-batch i goes to device i mod world."""
    cells = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    steps = [cells[i : i + accumulation * world] for i in range(0, len(cells), accumulation * world)]
    return [[np.concatenate(step[device::world]) for device in range(world)] for step in steps]


@pytest.fixture(scope="module")
def lengths(real_data) -> np.ndarray:
    """Characters of 5,000 real answers with their questions: as uneven as their tokens."""
    rows = json.loads((real_data / "instruct" / "alpaca_5000.json").read_text(encoding="utf-8"))
    return np.array([len(row["instruction"]) + len(row["input"]) + len(row["output"]) for row in rows], dtype=np.int32)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("cut", CUTS[1:])
def test_a_step_holds_the_same_documents_at_any_world_size(packing, cut):
    """333 documents in steps of 32: the last has 13, which most cuts do not divide."""
    random = np.random.default_rng(3)
    lengths, order = random.integers(2, 500, 333), document_order(333, 42, 0)
    micro_batch, accumulation, world = cut
    if micro_batch * accumulation * world != 32:
        micro_batch = 32 // (accumulation * world)
    laid = laid_out(order, lengths, packing=packing, micro_batch=micro_batch, accumulation=accumulation, world=world)
    assert len(laid) % (micro_batch * world) == 0
    for number, step in enumerate(dealt(laid, micro_batch, accumulation, world)):
        together = np.concatenate(step)
        own = together[together != 333]  # the silent document fills the last step alone
        assert sorted(own) == sorted(order[32 * number : 32 * (number + 1)])
        assert len(own) == len(set(own)), "a document on two devices"
        assert len(together) == 32 or number == 10
        assert {len(device) for device in step} == {len(together) // world}


def test_one_device_keeps_the_mixtures_own_order():
    lengths, order = np.random.default_rng(3).integers(2, 500, 333), document_order(333, 42, 0)
    alone = {"micro_batch": 4, "accumulation": 8, "world": 1}
    assert np.array_equal(laid_out(order, lengths, packing=True, **alone), order)
    assert np.array_equal(laid_out(order, lengths, packing=False, **alone), grouped_by_length(order, lengths, 32))


def test_an_epoch_that_divides_has_no_silent_document():
    lengths, order = np.full(64, 9), document_order(64, 1, 0)
    assert sorted(laid_out(order, lengths, packing=True, micro_batch=4, accumulation=2, world=4)) == list(range(64))


def test_it_is_the_same_each_time_and_equal_lengths_stand_as_they_stood():
    lengths, order = np.random.default_rng(3).integers(2, 9, 256), document_order(256, 1, 0)
    cut = {"micro_batch": 4, "accumulation": 4, "world": 4}
    assert np.array_equal(balanced(order, lengths, **cut), balanced(order.copy(), lengths.astype(np.int32), **cut))
    flat = balanced(order, np.full(256, 7), micro_batch=1, accumulation=1, world=64)
    assert np.array_equal(flat, order)


def test_by_hand():
    """Two devices, two passes of two documents: 9 8 7 5 4 3 2 1 go to cells 9+1, 8+2, 7+3, 5+4 of 10, 10, 10, 9."""
    lengths = np.array([9, 8, 7, 5, 4, 3, 2, 1])
    laid = balanced(np.array([4, 7, 0, 5, 2, 6, 1, 3]), lengths, micro_batch=2, accumulation=2, world=2)
    cells = [sorted(cell) for cell in lengths[laid].reshape(4, 2).tolist()]
    assert cells == [[1, 9], [2, 8], [4, 5], [3, 7]], "the second pass turns the devices' order round"


@pytest.mark.parametrize(
    ("cut", "fullest"),
    [((16, 4, 2), 1.002), ((4, 16, 2), 1.007), ((16, 1, 8), 1.01), ((4, 4, 8), 1.05), ((8, 1, 64), 1.05)],
)
def test_real_lengths_are_balanced(lengths, cut, fullest):
    """The fullest device of a pass over the mean, averaged over the whole steps of an epoch; and over a whole step."""
    micro_batch, accumulation, world = cut
    step = micro_batch * accumulation * world
    order = document_order(len(lengths), 42, 0)[: len(lengths) // step * step]
    laid = balanced(order, lengths, micro_batch=micro_batch, accumulation=accumulation, world=world)

    def over_mean(arranged: np.ndarray) -> tuple[float, float]:
        passes = lengths[arranged].reshape(-1, micro_batch).sum(1).reshape(-1, world)
        steps = passes.reshape(-1, accumulation, world).sum(1)
        return (passes.max(1) / passes.mean(1)).mean(), (steps.max(1) / steps.mean(1)).mean()

    (before, _), (after, by_step) = over_mean(order), over_mean(laid)
    print(f"fullest over mean {before:.3f}, balanced {after:.4f}, over a step {by_step:.4f}")
    assert after < fullest < before and by_step <= after


def test_it_is_near_the_best_there_is():
    """Every way of laying eight documents into four cells of two, tried: the fullest is within 4/3 of the least."""
    random = np.random.default_rng(5)
    for _ in range(40):
        lengths = random.integers(1, 100, 8)
        laid = balanced(np.arange(8), lengths, micro_batch=2, accumulation=1, world=4)
        found = lengths[laid].reshape(4, 2).sum(1).max()
        best = min(lengths[list(way)].reshape(4, 2).sum(1).max() for way in permutations(range(8)) if way[0] == 0)
        assert best <= found <= best * 4 / 3


def test_the_largest_pass_comes_first_and_is_smaller_than_before(lengths):
    order = document_order(len(lengths), 42, 0)[:4864]
    cut = {"micro_batch": 8, "accumulation": 4, "world": 4}
    before, after = (
        lengths[one].reshape(-1, 8).sum(1).reshape(38, 16) for one in (order, balanced(order, lengths, **cut))
    )
    assert (after[:, :4].max(1) == after.max(1)).all()
    assert (after.max(1) <= before.max(1)).all() and after.max() < 0.8 * before.max()


def test_an_order_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="30 documents are no multiple of 4 × 2"):
        balanced(np.arange(30), np.ones(30), micro_batch=4, accumulation=2, world=2)


def test_no_documents_at_all():
    none = laid_out(np.arange(0), np.arange(0), packing=True, micro_batch=4, accumulation=2, world=2)
    assert len(none) == 0 and with_silent(np.array([3], dtype=np.int32)).tolist() == [3, SILENT]
