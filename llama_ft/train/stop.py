"""Ctrl-C and SIGTERM: a run ends soon, with everything it has computed on the disk, and says how it goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.recipe.run import Run
from llama_ft.train.checks import how_to_go_on

if TYPE_CHECKING:
    from llama_ft.train.peers import Peers

STOPPED = 130
"""Exit status of a run that a signal ended: 128 + SIGINT, as a shell has it."""


class StopCleanly(TrainerCallback):
    """What a signal does depends on where the run stands.

    - A step: it is finished, a checkpoint written, and the run ends. A second Ctrl-C ends it at once.
    - An evaluation between steps: it is given up, a checkpoint written, and --resume evaluates first.
    - A checkpoint being written: it is finished, however many signals arrive.
    - Start-up and export, which lose nothing: they end at once.

    Of several processes a launcher ends all when one is lost: SIGTERM then waits for what the watch has to say of it.

    The run leaves through SystemExit(130) in each case.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.asked: str | None = None
        self.peers: Peers | None = None
        """The watch over the other processes, where there are any."""
        self.training = False
        self._saving = False
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM until :meth:`restore`; nothing outside of the main thread, which gets none."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Nothing but SIGKILL interrupts what is done inside."""
        self._saving = True
        pausing = self.peers.headway.pausing("writing a checkpoint") if self.peers else nullcontext()
        try:
            with pausing:
                yield
        finally:
            self._saving = False

    def agreed(self) -> bool:
        """Whether a process of this run was asked to stop. All processes ask at the same place: a signal reaches them
        at different moments, and one that stopped a step before the others would leave them waiting for it. One that
        comes while they ask counts the next time.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.asked is not None
        flag = torch.tensor(int(self.asked is not None), device=PartialState().device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if flag.item() and self.asked is None:
            self.asked = "another process was stopped"
        return bool(flag.item())

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() != self._owner:  # a worker that was forked: it ends as if we had never been here
            raise SystemExit(128 + number)
        again, self.asked = self.asked is not None, signal.Signals(number).name
        if self._saving:
            self._say("stopping as soon as the checkpoint is whole …")
        elif not self.training or (again and number == signal.SIGINT):
            if self.peers is not None and number == signal.SIGTERM and not again:
                self.peers.settle()
            self._say(f"stopped; {how_to_go_on(self.run)}")
            raise SystemExit(STOPPED)
        elif not again:
            self._say("stopping after this step, with a checkpoint …")

    def _say(self, text: str) -> None:
        # Not print: the signal may have come in the middle of one, and a buffer cannot be entered twice.
        os.write(2, f"\n{self.asked}: {text}\n".encode())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        self.training = state.global_step > 0  # a fresh run has nothing to lose in its first evaluation

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        self.training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        # The last step is followed by a checkpoint and the end anyway.
        if self.agreed() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        self.training = False
