"""What the user sees and keeps while a run trains: a progress line, metrics.jsonl, loss.png, a clean stop."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.recipe.run import Run


class Metrics(TrainerCallback):
    """Appends every logged line to metrics.jsonl, flushed at once: what a killed run leaves is what it did."""

    def __init__(self, run: Run, start_step: int = 0):
        self.path = run.metrics_file
        self._drop_after(start_step)
        self.file = self.path.open("a", encoding="utf-8")

    def _drop_after(self, step: int) -> None:
        """On resume, forget lines of steps that will be run again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed run may be cut
                continue
            if record.get("step", 0) <= step:
                kept.append(line)
        aside = self.path.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(self.path)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any):
        if state.is_world_process_zero:
            record = {"step": state.global_step, **logs}
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


class ProgressLine(TrainerCallback):
    """A rich bar on a terminal, one plain line per step elsewhere: loss, labelled tokens/s, memory, time left."""

    def __init__(self, console: Console):
        self.console = console
        self.progress: Progress | None = None
        self.task: Any = None
        self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        if not state.is_world_process_zero:
            return
        self.started = time.perf_counter()
        self.first_step = state.global_step
        if self.console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self.progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
            self.task = self.progress.add_task("…", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self.keep(state, f"held-out loss {logs['eval_loss']:.4f}")
        elif "labelled_tokens_per_second" in logs:
            rate = logs["labelled_tokens_per_second"]
            done = state.global_step - self.first_step
            left = (time.perf_counter() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
            memory = psutil.Process().memory_info().rss / 2**30
            self.update(
                state,
                f"loss {logs['loss']:.4f} · {rate:.0f} labelled tokens/s · {memory:.1f} GiB · {_minutes(left)} left",
            )

    def update(self, state: TrainerState, text: str) -> None:
        """The line of the step just done: the bar's text, or a line of its own."""
        if self.progress is None:
            print(f"step {state.global_step}/{state.max_steps} · {text}", flush=True)
        else:
            self.progress.update(self.task, completed=state.global_step, description=text)

    def keep(self, state: TrainerState, text: str) -> None:
        """A line that stays on the terminal above the bar."""
        when = f"step {state.global_step}" if state.global_step else "before training"
        self.console.print(f"{when} · {text}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        self.close()

    def close(self) -> None:
        """Gives the terminal back; safe to call twice."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StopCleanly(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.previous: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over SIGINT and SIGTERM until :meth:`restore`."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        print(f"\n{self.asked}: stopping after this step, with a checkpoint …", file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        if self.asked and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        return control


def plot_losses(run: Run) -> Path:
    """loss.png: the training and held-out loss of metrics.jsonl against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per labelled token)", title=run.path.name)
    axes.grid(alpha=0.3)
    axes.legend()
    target = run.path / "loss.png"
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target
