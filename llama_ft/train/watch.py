"""Everything that watches a run while it trains: what it measures, shows, records and asks."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from rich.console import Console
from transformers import TrainerCallback

from llama_ft.data.prepare import Prepared
from llama_ft.plan.hardware import these_gpus
from llama_ft.recipe.run import Run
from llama_ft.train.base import Base
from llama_ft.train.engine import engine_in_force
from llama_ft.train.load import Loaded
from llama_ft.train.machine import measure_machine
from llama_ft.train.progress import Metrics, ProgressLine
from llama_ft.train.samples import SampleAtEvaluations, Samples
from llama_ft.train.scored import ScoredSamples
from llama_ft.train.status import Status
from llama_ft.train.trackers import trackers


class Watch:
    """The callbacks of a run in their order, and the questions it is asked. Only that of the main process records.

    step: the one that a run is resumed from, or None. `samples` is None in the other processes.
    """

    def __init__(
        self,
        run: Run,
        base: Base,
        loaded: Loaded,
        prepared: Prepared,
        state: PartialState,
        console: Console,
        step: int | None,
    ):
        self.console, self.fresh = console, step is None
        found = these_gpus() if state.device.type == "cuda" else None
        peak = found.card.flops * state.num_processes if found is not None and found.card is not None else None
        machine = measure_machine(base, loaded, prepared.lengths, state.device, peak)
        self.progress = ProgressLine(console)
        self.status = Status(run, console, machine, main=state.is_main_process)
        self.callbacks: list[TrainerCallback] = [machine, self.progress, self.status]
        self.samples: Samples | None = None
        if state.is_main_process:
            self.callbacks += [Metrics(run, step or 0), *trackers(base.recipe, run, step or 0)]
            scores = base.recipe.training.objective == "reward"
            self.samples = ScoredSamples(run, prepared) if scores else Samples(run, prepared)

    def ask(self, trainer: Any) -> None:
        """Before training: the first answers of a fresh run, and a place in the trainer for those on the way."""
        samples = self.samples
        if samples is None or not samples.chosen:
            return
        if engine_in_force(trainer.accelerator).cuts_weights:
            said = "no process has all weights: questions are asked at the end alone, before and after training"
            self.console.print(said, highlight=False, soft_wrap=True)
            return
        trainer.add_callback(SampleAtEvaluations(samples))
        if self.fresh:
            samples.answer(trainer.model, "before")
