"""The order of a run through accelerate's own data loader, as each of several processes sees it."""

from __future__ import annotations

from itertools import chain

import datasets
import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from llama_ft.data.mixture import Mixture
from llama_ft.plan.steps import Cut, largest_pass
from llama_ft.recipe import load_recipe
from llama_ft.train.steps import EpochOrder, held_out, with_silence
from tests.plan.conftest import facts

DOCUMENTS = 77  # in steps of 16 the last has 13


def documents() -> datasets.Dataset:
    lengths = np.random.default_rng(7).integers(2, 300, DOCUMENTS).tolist()
    ids = [[number] * length for number, length in enumerate(lengths)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def passes(cut: Cut, *, packing: bool = True, epochs: int = 2) -> list[list[list[list[int]]]]:
    """[process][epoch][pass]: the numbers of the documents it was given, -1 for the silent one."""
    train = with_silence(documents())
    lengths = np.array([len(row) for row in documents()["input_ids"]])
    found = []
    for process in range(cut.world):
        order = EpochOrder(Mixture((DOCUMENTS,), (DOCUMENTS,), 42), cut, lengths, packing=packing)
        loader = DataLoader(train, cut.micro_batch, sampler=order, collate_fn=list)
        own = prepare_data_loader(loader, num_processes=cut.world, process_index=process, put_on_device=False)
        seen = []
        for epoch in range(epochs):
            own.set_epoch(epoch)
            seen.append([[_number(document) for document in batch] for batch in own])
        found.append(seen)
    return found


def _number(document: dict) -> int:
    return -1 if document["labels"][0] == -100 else document["input_ids"][0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("cut", [Cut(4, 2, 2), Cut(2, 4, 2), Cut(4, 1, 4), Cut(2, 1, 8)])
def test_processes_share_each_step_as_one_process_has_it(cut, packing):
    alone = passes(Cut(4, 4, 1), packing=packing)[0]
    shared = passes(cut, packing=packing)
    for epoch in range(2):
        expected = list(chain(*alone[epoch]))
        counts = {len(process[epoch]) for process in shared}
        assert len(counts) == 1, "every process has as many passes"
        for step in range(5):
            own = slice(step * cut.accumulation, (step + 1) * cut.accumulation)
            each = [list(chain(*process[epoch][own])) for process in shared]
            together = [number for one in each for number in one if number >= 0]
            assert sorted(together) == sorted(expected[16 * step : 16 * (step + 1)])
            assert len(together) == len(set(together)), "a document on two processes"
    assert shared[0][0] != shared[0][1], "the second epoch has an order of its own"


def test_accelerate_deals_what_was_balanced():
    """Both processes have about as many tokens in each pass; as the mixture has them they do not."""
    lengths = np.array([len(row) for row in documents()["input_ids"]] + [2])
    cut = Cut(4, 2, 2)
    shared = passes(cut, epochs=1)
    tokens = np.array([[lengths[one].sum() for one in process[0]] for process in shared])[:, :8]
    order = Mixture((DOCUMENTS,), (DOCUMENTS,), 42).order(0)[:64]
    plain = lengths[order].reshape(-1, 2, 4).sum(2).T
    uneven = [(one.max(0) / one.mean(0)).mean() for one in (plain, tokens)]
    assert uneven[0] > 1.15 and uneven[1] < 1.03, uneven


def test_the_planned_longest_pass_is_the_one_that_comes():
    rows = [len(row) for row in documents()["input_ids"]]
    lengths = np.array([*rows, 2])
    recipe = load_recipe("quickstart", ["training.global_batch=16"])
    for packing in (True, False):
        arranged = recipe.model_copy(update={"sequence": recipe.sequence.model_copy(update={"packing": packing})})
        for cut in (Cut(4, 4, 1), Cut(4, 2, 2), Cut(2, 1, 8)):
            seen = passes(cut, packing=packing, epochs=1)
            longest = max(int(lengths[one].sum()) for process in seen for one in process[0])
            assert largest_pass(arranged, facts(rows), cut) == (longest, pytest.approx(longest / 2, abs=4))


@pytest.mark.parametrize("cut", [Cut(4, 1, 2), Cut(8, 1, 8), Cut(2, 1, 1)])
def test_an_evaluation_counts_each_document_once(cut):
    """accelerate alone would feed the first documents again until the processes have as many."""
    shared = held_out(documents(), cut)
    found = []
    for process in range(cut.world):
        loader = DataLoader(shared, cut.micro_batch, collate_fn=list)
        own = prepare_data_loader(loader, num_processes=cut.world, process_index=process, put_on_device=False)
        found += [_number(document) for batch in own for document in batch]
    assert sorted(number for number in found if number >= 0) == list(range(DOCUMENTS))
    assert held_out(None, cut) is None


def test_a_resumed_run_needs_nothing_but_the_epoch():
    cut, lengths = Cut(4, 2, 2), np.random.default_rng(7).integers(2, 300, DOCUMENTS)
    first, other = (EpochOrder(Mixture((DOCUMENTS,), (DOCUMENTS,), 42), cut, lengths, packing=True) for _ in range(2))
    for epoch in range(3):
        first.set_epoch(epoch)
        went_on = list(first)
    other.set_epoch(2)
    assert list(other) == went_on and len(other) == len(went_on) == 80
