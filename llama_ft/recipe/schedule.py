"""The learning rate as a share of its peak, step by step: what the trainer follows and a plan draws. No torch.

The formulas are transformers' own (`get_cosine_schedule_with_warmup` and its kin, `get_wsd_schedule`): the rate of
optimizer step k, counted from 0, is a function of k alone.
"""

from __future__ import annotations

import math

from llama_ft.recipe.schema import Training


def steps_of(length: float, steps: int) -> int:
    """A length in steps: what is given below 1 is a share of all steps, rounded up."""
    return math.ceil(length * steps) if length < 1 else int(length)


def warmup_steps(training: Training, steps: int) -> int:
    """Steps of the warm-up in a run of `steps`; of what is given in tokens, whole steps that hold as many."""
    if training.warmup_tokens is not None:
        return -(-training.warmup_tokens // training.global_batch)
    return steps_of(float(training.warmup), steps)


def rate(training: Training, step: int, steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0) of `steps`.

    Linear warm-up from 0, then `training.schedule`, which ends at `training.final_rate`; `wsd` stays at the peak until
    `training.decay` is left and then falls linearly.
    """
    warmup = warmup_steps(training, steps)
    if step < warmup:
        return step / warmup
    if training.schedule == "constant":
        return 1.0
    start = max(warmup, steps - steps_of(float(training.decay), steps)) if training.schedule == "wsd" else warmup
    done = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    fallen = 0.5 * (1.0 - math.cos(math.pi * done)) if training.schedule == "cosine" else done
    floor = float(training.final_rate)
    return floor + (1.0 - floor) * (1.0 - fallen)
