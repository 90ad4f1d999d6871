"""What a run takes of its machine: the memory it holds, and its share of the arithmetic the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llama_ft.llama.load import DTYPES
from llama_ft.llama.shapes import Shape
from llama_ft.plan.flops import per_token
from llama_ft.plan.weights import Weights
from llama_ft.recipe.schema import Recipe
from llama_ft.train.base import Base
from llama_ft.train.load import Loaded, trains_base_weights

GIB = 2**30
SECONDS = 0.3
"""About how long the measurement of the machine's rate may take."""
REPEATS = 3
LEAST_SECONDS = 0.005
"""How long a product is repeated at least: a short one meets a busy moment more easily."""
HEAD_ROWS = 8192
"""Rows of the head that are multiplied: so wide a product runs at the rate of the whole head, which would take long."""


class Machine(TrainerCallback):
    """Adds `memory_gib` and `fraction_of_machine` to every training line; goes before the callbacks that show lines.

    rate: FLOP/s of all processes' devices together (:func:`machine_rate`), or of a step that did more: then others used
    the machine while it was measured. flops: FLOP of a token of the run, given the share of tokens that carry loss.
    utilised: FLOP of a token with no layer computed twice, where `mfu` is wanted too: as a share of
    `peak`, the cards' by their vendor (FLOP/s of all processes), or of `rate` where there is none. As PaLM's MFU
    (arXiv 2204.02311, appendix B), but for attention, of which the causal half is counted, its scores made twice.
    """

    def __init__(
        self,
        rate: float,
        flops: Callable[[float], float],
        utilised: Callable[[float], float] | None = None,
        peak: float | None = None,
    ):
        self.rate, self.flops, self.utilised, self.peak = rate, flops, utilised, peak

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any):
        if not logs or "tokens_per_second" not in logs:
            return
        logs.update(memory(args.device))
        tokens, labelled = logs["tokens_per_second"], logs["labelled_tokens_per_second"]
        if tokens:
            done = self.flops(labelled / tokens) * tokens
            self.rate = max(self.rate, done)
            logs["fraction_of_machine"] = round(done / self.rate, 4)
            if self.utilised is not None:
                logs["mfu"] = round(self.utilised(labelled / tokens) * tokens / (self.peak or self.rate), 4)


def measure_machine(
    base: Base, loaded: Loaded, lengths: Sequence[int] | np.ndarray, device: torch.device, peak: float | None = None
) -> Machine:
    """Measures the machine for a run; called by every process at the same moment, for they share one machine.

    lengths: tokens of each document. peak: FLOP/s of all devices by their vendor, where they are known cards.
    """
    dtype = loaded.compute_dtype
    if trains_base_weights(base) and device.type == "cuda":  # float32 masters, multiplied under autocast
        dtype = DTYPES[base.recipe.model.dtype]
    own = torch.tensor(machine_rate(base.shape, dtype, device), device=device)
    total: Any = reduce(own, "sum")
    recipe, shape = base.recipe, base.shape
    utilised = None
    if recipe.training.objective == "pretrain":
        once = recipe.training.model_copy(update={"gradient_checkpointing": False})
        utilised = token_flops(recipe.model_copy(update={"training": once}), shape, lengths, grown=base.grown)
    return Machine(float(total), token_flops(recipe, shape, lengths, grown=base.grown), utilised, peak)


def token_flops(
    recipe: Recipe, shape: Shape, lengths: Sequence[int] | np.ndarray, *, grown: bool = False
) -> Callable[[float], float]:
    """FLOP of one token of a run, as a function of the share that carries loss; llama_ft.plan.flops has the formula.

    lengths: tokens of each document, of which attention needs Σℓ²/Σℓ. grown: tokens were added, so that embedding and
    head are trained.
    """
    tokens = np.asarray(lengths, dtype=np.float64)
    context = float((tokens**2).sum() / tokens.sum()) if tokens.sum() else 0.0
    weights = Weights(shape, recipe.adapter, grown)
    return lambda labelled: per_token(weights, recipe.training, labelled=labelled, mean_context=context)


def memory(device: torch.device) -> dict[str, float]:
    """GiB held, as a training line tells them.

    On a CPU `memory_gib` is the resident memory of this process and its children, now. On a GPU it is the most that
    tensors have held since the process began, `memory_reserved_gib` what the allocator took for them from the device.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"memory_gib": round(allocated / GIB, 3), "memory_reserved_gib": round(reserved / GIB, 3)}
    own = psutil.Process()
    held = own.memory_info().rss
    for child in own.children(recursive=True):
        try:
            held += child.memory_info().rss
        except psutil.NoSuchProcess:  # a helper that has just ended
            continue
    return {"memory_gib": round(held / GIB, 3)}


def machine_rate(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one process's device at the model's own matrix products: ΣFLOP / Σtime, forward and backward.

    Each projection of every block and the head count in their three orientations, x·Wᵀ, dy·W and dyᵀ·x, in the type and
    with the threads that the run multiplies with. The fastest of some repeats counts: noise only slows. Takes about
    SECONDS; a model too large for that is measured with fewer tokens.
    """
    products = [(out, into, shape.layers) for out, into in shape.projections.values()]
    products.append((min(HEAD_ROWS, shape.vocabulary), shape.hidden, 1))
    head_share = shape.vocabulary / products[-1][0]
    first = products[0]
    guess = 6 * 128 * first[0] * first[1] / _three_orientations(first[0], first[1], 128, dtype, device)
    weights = sum(out * into for out, into, _ in products)
    tokens = 4096 if device.type == "cuda" else 1024
    while tokens > 32 and 6 * tokens * weights * (REPEATS + 1) / guess > SECONDS:
        tokens //= 2
    flops = seconds = 0.0
    until = time.perf_counter() + 2 * SECONDS  # on a machine that others use, repeats give way
    for number, (out, into, layers) in enumerate(products):
        times = layers if number + 1 < len(products) else head_share
        flops += times * 6 * tokens * out * into
        seconds += times * _three_orientations(out, into, tokens, dtype, device, until)
    return flops / seconds


def _three_orientations(
    out: int, into: int, tokens: int, dtype: torch.dtype, device: torch.device, until: float = 0.0
) -> float:
    """Seconds that the products of one linear layer take in a forward and a backward pass."""
    # Random numbers, for a GPU multiplies equal ones faster; of its own, for training's must not move.
    random = torch.Generator(device).manual_seed(0)
    sizes = ((tokens, into), (tokens, out), (out, into))
    x, dy, weight = (_rows(*size, random).to(dtype) for size in sizes)
    products = ((x, weight.t()), (dy, weight), (dy.t(), x))
    return sum(_fastest(left, right, device, until) for left, right in products)


def _rows(rows: int, columns: int, random: torch.Generator) -> torch.Tensor:
    """A matrix of random rows that come again: drawing each anew would take longer than the products."""
    some = torch.randn(min(rows, 64), columns, generator=random, device=random.device)
    return some.repeat(-(-rows // len(some)), 1)[:rows]


def _fastest(left: torch.Tensor, right: torch.Tensor, device: torch.device, until: float) -> float:
    """Seconds of one product: the least of REPEATS measurements or more, of one when the time is up."""
    on_gpu = device.type == "cuda"
    calls = 10 if on_gpu else 1  # a single small product would time the launch of its kernel
    torch.mm(left, right)
    best = float("inf")
    began, repeats = time.perf_counter(), 0
    while repeats < REPEATS or time.perf_counter() - began < LEAST_SECONDS:
        repeats += 1
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            torch.mm(left, right)
        if on_gpu:
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        best = min(best, (end - start) / calls)
        if end > until:
            break
    return best
