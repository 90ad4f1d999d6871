"""How far this process is, for the others: the step, the micro-batch, and what its main thread is doing.

The main thread moves it at each forward pass and each of the trainer's events; the thread that tells the others reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

READING, FORWARD, BACKWARD, ENDED, ASKED = range(5)
"""The order of things within a pass; ASKED is what comes between two: evaluations and answers."""


class Headway:
    """`count` moves with every sign of progress. `limit`: seconds without one that are too many, 0 for no end."""

    def __init__(self) -> None:
        self.count = 0
        self.step, self.phase, self.pass_ = 0, READING, 0
        self.doing = "starting"
        self.limit = 0.0
        self.paused = 0

    def move(self, doing: str, *, step: int | None = None, phase: int | None = None) -> None:
        """A sign of progress; a new step or phase begins its passes anew."""
        if step is not None and step != self.step:
            self.step, self.pass_ = step, 0
        if phase is not None:
            self.phase = phase
        self.doing = doing
        self.count += 1

    @contextmanager
    def pausing(self, doing: str) -> Iterator[None]:
        """What is done inside may take as long as it takes."""
        before = self.doing
        self.paused += 1
        self.move(doing)
        try:
            yield
        finally:
            self.paused -= 1
            self.move(before)

    def note(self) -> dict[str, Any]:
        """As the others read it. `place` orders processes by how far they are: a step has many passes, a pass several
        phases."""
        return {
            "count": self.count,
            "doing": self.doing,
            "step": self.step,
            "place": [self.step, self.pass_, self.phase, exchanges()],
            "limit": 0 if self.paused else self.limit,
        }


def exchanges() -> int:
    """How many exchanges with the other processes this one has begun; -1 where the backend does not count them."""
    if not (dist.is_available() and dist.is_initialized()):
        return -1
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        group: Any = dist.distributed_c10d._get_default_group()
        return int(group._get_backend(device)._get_sequence_number_for_group())
    except (RuntimeError, AttributeError, ValueError):
        return -1


class Follow(TrainerCallback):
    """Moves the headway along a training. `limit`: seconds without progress that are too many, from the first step on.

    waits_for_first: reading up to the first step may take any time, as where a stream is resumed.
    """

    def __init__(self, headway: Headway, limit: float, *, waits_for_first: bool):
        self.headway, self.limit, self.waits_for_first = headway, limit, waits_for_first
        self.hooks: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        model = kwargs["model"]
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner = getattr(base, "model", base)
        # Not the module itself: losses and log-probabilities go by its own roads, which all begin and end with these.
        first, last = getattr(inner, "embed_tokens", inner), getattr(inner, "norm", inner)
        self.hooks = [first.register_forward_pre_hook(self._before), last.register_forward_hook(self._after)]
        self.headway.limit = 0 if self.waits_for_first else self.limit
        self.headway.move("reading the first documents", step=state.global_step, phase=ENDED)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        step = state.global_step + 1
        self.headway.move(f"beginning step {step}", step=step, phase=READING)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        self.headway.limit = self.limit
        self.headway.move(f"between step {state.global_step} and the next", step=state.global_step, phase=ENDED)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        for hook in self.hooks:
            hook.remove()
        self.headway.limit = 0
        self.headway.move("finishing the run")

    def _before(self, module: torch.nn.Module, *_: Any) -> None:
        headway = self.headway
        headway.pass_ += 1
        if module.training:
            step = f"of step {headway.step}"
            headway.move(f"in the forward pass of micro-batch {headway.pass_} {step}", phase=FORWARD)
        else:
            headway.move(f"evaluating or answering after step {headway.step}", phase=ASKED)

    def _after(self, module: torch.nn.Module, *_: Any) -> None:
        if module.training:
            headway = self.headway
            headway.move(
                f"behind the forward pass of micro-batch {headway.pass_} of step {headway.step}", phase=BACKWARD
            )
