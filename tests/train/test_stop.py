"""Several processes stop at the same step, whenever the signal comes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from llama_ft.recipe.run import Run
from llama_ft.train.stop import StopCleanly


@pytest.fixture
def several(monkeypatch):
    """As if there were a group; `meanwhile` is what happens while its processes ask each other."""
    happens = []

    def all_reduce(flag, op):
        for act in happens:
            act(flag)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return happens


def test_a_signal_while_they_ask_counts_the_next_time(tmp_path, several):
    """This process waits for the slowest one, and a signal finds it there: the others were told that nobody stops."""
    stop = StopCleanly(Run(tmp_path))
    several.append(lambda flag: setattr(stop, "asked", "SIGTERM"))
    assert not stop.agreed()
    several.clear()
    assert stop.agreed()


def test_another_process_was_stopped(tmp_path, several):
    stop = StopCleanly(Run(tmp_path))
    several.append(lambda flag: flag.fill_(1))
    assert stop.agreed() and stop.asked == "another process was stopped"


def test_alone_a_signal_is_all_it_takes(tmp_path):
    stop = StopCleanly(Run(tmp_path))
    assert not stop.agreed()
    stop.asked = "SIGTERM"
    assert stop.agreed()
