"""A micro-batch that does not fit after all: `auto` is corrected once, on the real machine.

A plan computes what a pass needs; what the allocator wastes it can only guess. Where the first steps of a run find the
GPU too small, the run begins anew with half the micro-batch and twice the accumulation: same global batch, same curve.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable

import torch
from accelerate import PartialState
from rich.console import Console

from llama_ft.errors import MachineFault
from llama_ft.plan.steps import per_device
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe

TOO_LARGE = torch.cuda.OutOfMemoryError


def corrected_once(train: Callable[[int | None], None], recipe: Recipe, run: Run) -> None:
    """Calls `train(None)`; where the GPU's memory runs out, `train(micro_batch)` once more with half of it.

    `train` takes the micro-batch in place of the recipe's, and None for the recipe's own or the plan's. MachineFault,
    which says how to go on, when it was not `auto` that chose it, a checkpoint lies there, several processes train (the
    others wait for the one that failed), one document is too much already, or memory runs out again.
    """
    try:
        train(None)
    except TOO_LARGE as error:
        micro_batch = _of_lock(run)
        half = largest_half(recipe, micro_batch)
        if half is None or not may_correct(recipe, run):
            raise out_of_memory(recipe, run, micro_batch) from error
        _let_go(error)
        Console().print(
            f"micro-batch {micro_batch} does not fit this GPU: beginning anew with {half}, same global batch",
            highlight=False,
            soft_wrap=True,
        )
    else:
        return
    try:
        train(half)
    except TOO_LARGE as error:
        raise out_of_memory(recipe, run, half) from error


def may_correct(recipe: Recipe, run: Run) -> bool:
    """Whether the run may begin anew: `auto` chose, nothing was saved yet, and no other process waits."""
    alone = PartialState().num_processes == 1
    return recipe.training.micro_batch == "auto" and alone and not run.steps()


def largest_half(recipe: Recipe, micro_batch: int | None) -> int | None:
    """The largest divisor of the global batch that is at most half of `micro_batch`; None when one was too much."""
    if micro_batch is None or micro_batch < 2:
        return None
    batch = per_device(recipe, 1)
    return next(n for n in range(micro_batch // 2, 0, -1) if batch % n == 0)


def out_of_memory(recipe: Recipe, run: Run, micro_batch: int | None) -> MachineFault:
    """What is said when a run ends for lack of a GPU's memory."""
    half = largest_half(recipe, micro_batch)
    steps = run.steps()
    again = "--resume" if steps else "--overwrite"
    less = f"training.micro_batch={half}" if half else "training.gradient_checkpointing=true"
    kept = f"checkpoint step-{steps[-1]} is whole; " if steps else ""
    return MachineFault(
        f"the GPU's memory ran out with {micro_batch or 'some'} documents a pass",
        where=str(run.path),
        key="training.micro_batch",
        hint=f"{kept}go on with {again} {less}; llama-ft plan says what fits",
    )


def _of_lock(run: Run) -> int | None:
    return Run(run.path).lock.get("micro_batch") if run.lock_file.exists() else None


def _let_go(error: BaseException) -> None:
    """Frees what the failed attempt still holds: its frames keep the model, the trainer and their tensors alive."""
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
