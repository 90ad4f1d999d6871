"""What the user sees and keeps while a run trains: a progress line, metrics.jsonl, loss.png, a clean stop."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.files import keep_lines
from llama_ft.recipe.run import Run


class Metrics(TrainerCallback):
    """Appends every logged line to metrics.jsonl, flushed at once: what a killed run leaves is what it did."""

    def __init__(self, run: Run, start_step: int = 0):
        self.path = run.metrics_file
        keep_lines(self.path, lambda line: line.get("step", 0) <= start_step)  # the others will be run again
        self.file = self.path.open("a", encoding="utf-8")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any):
        if state.is_world_process_zero:
            record = {"step": state.global_step, **logs}
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


RECENT = 20
"""Steps whose mean time tells how long the rest will take: start-up and what the machine did long ago do not count."""


class TimeLeft:
    """What is left of a run, from the time of its last RECENT steps and of its last evaluation."""

    def __init__(self) -> None:
        self.steps: deque[float] = deque(maxlen=RECENT)
        self.evaluation = 0.0
        self.last: float | None = None
        self.evaluated = False

    def step(self, seconds: float, now: float) -> None:
        """A step of `seconds` has ended at `now`; saving and waiting for data count with it, an evaluation apart."""
        passed = seconds if self.last is None else now - self.last
        if self.evaluated and self.last is not None:
            self.evaluation = max(passed - seconds, 0.0)
            passed = seconds
        self.steps.append(passed)
        self.last, self.evaluated = now, False

    def evaluation_took(self, seconds: float) -> None:
        """The loss of an evaluation took so long; the next step tells what else it cost (answers, a checkpoint)."""
        self.evaluation = max(self.evaluation, seconds)
        self.evaluated = True

    def left(self, steps: int, evaluations: int) -> float:
        """Seconds for so many steps and evaluations more."""
        mean = sum(self.steps) / len(self.steps) if self.steps else 0.0
        return mean * steps + self.evaluation * evaluations


class Bar(Progress):
    """rich's bar, and the figures of the last step on a line of their own, which may wrap."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures)


class ProgressLine(TrainerCallback):
    """A rich bar on a terminal, one plain line per step elsewhere.

    Loss, the last held-out loss, labelled tokens/s, memory, fraction of the machine, time left.
    """

    def __init__(self, console: Console):
        self.console = console
        self.animated = console.is_terminal and not console.is_dumb_terminal
        self.progress: Bar | None = None
        self.task: Any = None
        self.time = TimeLeft()
        self.held_out: float | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        if state.is_world_process_zero and self.animated:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self.progress = Bar(*columns, console=self.console, refresh_per_second=4)
            self.task = self.progress.add_task("…", total=state.max_steps, completed=state.global_step)
            self.progress.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any):
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self.held_out = logs["eval_loss"]
            self.time.evaluation_took(logs.get("eval_seconds", 0.0))
            self.keep(state, held_out(logs))
        elif "labelled_tokens_per_second" in logs:
            self.time.step(logs["seconds"], time.perf_counter())
            steps = state.max_steps - state.global_step
            every = args.eval_steps or math.inf if args.eval_strategy != "no" else math.inf
            to_come = state.max_steps // every - (state.global_step - 1) // every  # this step's own is one of them
            self.update(state, figures(logs, self.held_out), f"{_minutes(self.time.left(steps, int(to_come)))} left")

    def update(self, state: TrainerState, text: str, left: str) -> None:
        """The line of the step just done: the bar's text, or a line of its own."""
        if self.progress is None:
            print(f"step {state.global_step}/{state.max_steps} · {text} · {left}", flush=True)
        else:
            self.progress.figures = text
            self.progress.update(self.task, completed=state.global_step, description=left)

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


def held_out(logs: dict[str, Any]) -> str:
    """An evaluation in words; a policy's loss is its mean reward with the sign turned, and is not told twice."""
    rewarded = logs["eval_loss"] == -logs.get("eval_reward", math.inf)
    parts = [] if rewarded else [f"held-out loss {logs['eval_loss']:.4f}"]
    if "eval_bits_per_byte" in logs:
        parts.append(f"{logs['eval_bits_per_byte']:.4f} bits per byte")
    parts += [f"{name} {loss:.4f}" for name, loss in logs.get("eval_loss_by_source", {}).items()]
    if "eval_accuracy" in logs:
        parts.append(f"accuracy {logs['eval_accuracy']:.1%}")
    if "eval_reward" in logs:
        parts.append(f"held-out reward {logs['eval_reward']:.4f}")
    if "eval_kl" in logs:
        parts.append(f"KL {logs['eval_kl']:.4f}")
    return " · ".join(parts)


def figures(logs: dict[str, Any], held_out: float | None) -> str:
    """A training line in words."""
    parts = [f"reward {logs['reward']:.4f}"] if "reward" in logs else [f"loss {logs['loss']:.4f}"]
    if "kl" in logs:
        parts.append(f"KL {logs['kl']:.4f}")
    if "accuracy" in logs:
        parts.append(f"accuracy {logs['accuracy']:.0%}")
    if held_out is not None and "reward" not in logs:
        parts.append(f"held-out {held_out:.4f}")
    parts.append(f"{logs['labelled_tokens_per_second']:,.0f} labelled tokens/s")
    if "memory_gib" in logs:
        reserved = f" of {logs['memory_reserved_gib']:.1f}" if "memory_reserved_gib" in logs else ""
        parts.append(f"{logs['memory_gib']:.1f}{reserved} GiB")
    if "mfu" in logs:
        parts.append(f"MFU {logs['mfu']:.0%}")
    elif "fraction_of_machine" in logs:
        parts.append(f"{logs['fraction_of_machine']:.0%} of the machine")
    return " · ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_losses(run: Run) -> Path:
    """loss.png: the training and held-out loss of metrics.jsonl, or of a policy the rewards, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    # A policy's loss says nothing; what it is after does.
    what = "reward" if any("reward" in record for record in records) else "loss"
    for key, label, style in ((what, "training", "-"), (f"eval_{what}", "held-out", "o-")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set(xlabel="step", ylabel=what, title=run.path.name)
    axes.grid(alpha=0.3)
    axes.legend()
    target = run.path / "loss.png"
    figure.savefig(target, dpi=120)
    plt.close(figure)
    return target
