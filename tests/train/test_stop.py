"""Several processes stop at the same step, whenever the signal comes."""

from __future__ import annotations

from types import SimpleNamespace

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


def test_a_later_epoch_is_told_to_the_order_itself(monkeypatch):
    """Resumed inside an epoch, several processes read through two wrappers that pass no epoch on."""
    from accelerate import skip_first_batches
    from accelerate.data_loader import prepare_data_loader
    from torch.utils.data import DataLoader, Sampler

    from llama_ft.train.resumable import ResumableTrainer, SFTTrainer

    class Order(Sampler[int]):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 8

        def __iter__(self):
            return iter([10 * self.epoch + place for place in range(8)])

    order = Order()
    loader = DataLoader(range(100), batch_size=2, sampler=order)
    rest = skip_first_batches(prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False), 1)

    def run_epoch(self, epoch, train_dataloader):
        train_dataloader.set_epoch(epoch)
        self.seen = [batch.tolist() for batch in train_dataloader]

    monkeypatch.setattr(SFTTrainer, "_run_epoch", run_epoch)
    trainer = object.__new__(ResumableTrainer)
    trainer.state, trainer.control = (
        SimpleNamespace(global_step=1, max_steps=9),
        SimpleNamespace(should_training_stop=0),
    )
    trainer.order = order
    trainer._run_epoch(epoch=3, train_dataloader=rest)
    assert trainer.seen == [[34, 35]]
