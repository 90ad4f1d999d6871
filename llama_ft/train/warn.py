"""What a run is warned of, and not stopped for: one line on the terminal, once, and warnings.json in the run.

Each sign is read off numbers that the run has anyway, and stays silent where they are too few or too noisy to tell.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from rich.console import Console
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.files import write_json
from llama_ft.recipe.run import Run
from llama_ft.recipe.schedule import warmup_steps
from llama_ft.recipe.schema import Recipe
from llama_ft.train.samples import MAX_NEW_TOKENS, Samples

SHORTEST = 25
"""Steps below which a learning curve says nothing."""
START = 3
"""Steps that are the start: a run may learn most of what it learns in the next ten."""
SEEN = 0.05
"""Share of the first loss that the noise must leave visible; a fine-tuning that works falls further."""
HELD_OUT_FELL = 0.005
"""Share of the first held-out loss. The same documents every time: what is left is no noise of the batch."""
RISES = 3
ROSE = 0.01
"""Evaluations in a row that rise, and share of the loss by which they do, that are called overfitting."""
UNLIKELY = 0.1
"""An end token below this where answers end."""
ANSWERS = 3
"""Fewer answers than this that go on and on may be an accident."""
HARDLY = 1e-4
"""Norm of an update beside that of its weights: rounding them to bfloat16 moves them by 2e-3, twenty times as far."""
LOW_RATES = {"full": 2e-7, "lora": 2e-6, "qlora": 2e-6}
"""A hundredth of what shipped recipes take: 2e-5 for all weights, 2e-4 and more for an adapter."""


class Warnings(TrainerCallback):
    """Watches one run from its main process. `step`: the one it is resumed from; what came before it is kept."""

    def __init__(self, run: Run, recipe: Recipe, console: Console, step: int | None):
        self.recipe, self.console = recipe, console
        self.file = run.path / "warnings.json"
        self.said = [one for one in _entries(self.file) if one["step"] <= step] if step else []
        self.records = [one for one in _lines(run.metrics_file) if one.get("step", 0) <= step] if step else []
        self.step = step or 0

    def say(self, name: str, message: str) -> None:
        """One warning, unless it was said before."""
        if any(one["name"] == name for one in self.said):
            return
        self.said.append({"step": self.step, "name": name, "message": message})
        write_json(self.file, self.said)
        self.console.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True, markup=False)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any):
        """After every step and every evaluation."""
        self.step = state.global_step
        self.records.append({"step": state.global_step, **(logs or {})})
        if "eval_loss" in self.records[-1]:
            rising = overfits([one["eval_loss"] for one in self.records if "eval_loss" in one])
            if rising is not None:
                self.say("overfitting", rising)
        # The warm-up must be over: nothing is learnt at a rate that is still near zero.
        warmed = warmup_steps(self.recipe.training, state.max_steps)
        if state.global_step == max(state.max_steps // 4, 2 * warmed) < state.max_steps:
            self._judge_curve()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any):
        """At the end of all steps; a run that was stopped says nothing."""
        if state.global_step < state.max_steps:
            return
        self._judge_curve()
        ends = [one["eval_end_probability"] for one in self.records if "eval_end_probability" in one]
        if ends and ends[-1] < UNLIKELY:
            before = f" ({ends[0]:.2g} at first)" if len(ends) > 1 else ""
            message = f"the end token has probability {ends[-1]:.2g} where held-out answers end{before}"
            self.say("end-token", f"{message}: the model may not stop by itself")

    def _judge_curve(self) -> None:
        losses = [one["loss"] for one in self.records if "loss" in one]
        held_out = [one["eval_loss"] for one in self.records if "eval_loss" in one]
        flat = stays_at_its_start(losses, held_out)
        if flat is None:
            return
        rate = float(self.recipe.training.learning_rate)
        low = rate < LOW_RATES[self.recipe.adapter.method]
        reason = f"training.learning_rate {rate:g} is far below what is usual" if low else "a possible reason is a"
        reason += "" if low else f" learning rate that is too low (it is {rate:g})"
        self.say("flat-curve", f"{flat}; {reason}")

    def finished(self, model: Any, samples: Samples) -> None:
        """After the last answers to held-out questions: whether they came to an end, and whether anything moved."""
        count = samples.prepared.tokenizer
        references = [len(count(turns[-1]["content"])["input_ids"]) for turns in samples.chosen]
        # A reference that is longer than an answer may be says nothing.
        ended = [one for one, tokens in zip(samples.ended, references, strict=False) if tokens < MAX_NEW_TOKENS]
        if len(ended) >= ANSWERS and not any(ended):
            said = f"none of {len(ended)} answers to held-out questions came to an end within {MAX_NEW_TOKENS} tokens"
            self.say("endless-answers", said)
        moved = relative_update(model)
        if moved is not None and moved < HARDLY:
            said = (
                f"the adapter hardly moved: its update is {moved:.1g} of the weights, which rounding to bfloat16 hides"
            )
            self.say("hardly-moved", said)


def stays_at_its_start(losses: Sequence[float], held_out: Sequence[float] = ()) -> str | None:
    """What shows that nothing was learnt, or None: it was, or the run is too short or too noisy to tell.

    losses: of the steps so far; held_out: of the evaluations, the first before training. The median of
    the last half is compared with the mean of the first three steps. σ of a step is 1.4826 times the median absolute
    deviation of that half, so that single bad batches do not count; the error of a mean is σ / √n, that of a median
    1.2533 · σ / √n. Silent unless two standard errors would have shown a fall of 5 %, or held-out losses, which have no
    noise of the batch, show no fall either.
    """
    if len(losses) < SHORTEST:
        return None
    last = losses[len(losses) // 2 :]
    start, end = sum(losses[:START]) / START, median(last)
    sigma = 1.4826 * median(abs(one - end) for one in last)
    error = sigma * math.sqrt(1 / START + 1.2533**2 / len(last))
    if start - end > 2 * error:
        return None
    if len(held_out) > 1:
        best = min(held_out[1:])
        if best < held_out[0] - HELD_OUT_FELL * abs(held_out[0]):
            return None
        return (
            f"nothing is learnt: held-out loss {held_out[0]:.4f} at first, {best:.4f} at best, and training is as flat"
        )
    if 2 * error > SEEN * start:
        return None
    return f"nothing is learnt: the last {len(last)} steps have a median loss of {end:.4f}, the first {start:.4f}"


def overfits(held_out: Sequence[float]) -> str | None:
    """Whether the last held-out losses only rise, and by more than a trifle; says so, or None."""
    tail = held_out[-RISES - 1 :]
    if len(tail) <= RISES or any(later <= earlier for earlier, later in pairwise(tail)):
        return None
    if tail[-1] - tail[0] < ROSE * abs(tail[0]):  # a policy's loss is its reward with the sign turned
        return None
    return (
        f"held-out loss rose {RISES} times in a row, {tail[0]:.4f} to {tail[-1]:.4f}: the run may be overfitting; "
        "export.checkpoint: best takes the lowest, fewer training.epochs save the time"
    )


@torch.no_grad()
def relative_update(model: Any) -> float | None:
    """‖Δ‖ / ‖W‖ over all weights that have a LoRA pair, Frobenius norms; None for a model without one.

    Δ = s · B · A, and ‖B · A‖² = tr(BᵀB · AAᵀ) of two r × r matrices. DoRA's magnitudes are left out.
    """
    update = weights = 0.0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name in module.lora_A:
            pair: list[Any] = [module.lora_A[name], module.lora_B[name]]
            down, up = (linear.weight for linear in pair)
            if isinstance(down, DTensor) or not down.numel():  # a shard, which one process alone cannot put together
                return None
            down, up = down.double(), up.double()
            update += module.scaling[name] ** 2 * float(((up.T @ up) * (down @ down.T)).sum())
            weights += float(dequantize_module_weight(module.get_base_layer()).double().square().sum())
    return math.sqrt(update / weights) if weights else None


def _entries(path: Any) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def _lines(path: Any) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # the last line of a killed run may be cut
            continue
    return found
