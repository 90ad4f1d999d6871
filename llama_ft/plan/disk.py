"""Bytes that a run writes: checkpoints, adapter, base, merged weights, GGUF files."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.plan.memory import Case, optimizer
from llama_ft.plan.weights import BYTES, FLOAT
from llama_ft.recipe.schema import Recipe

BITS = {"f32": 32.0, "bf16": 16.0, "f16": 16.0, "q8_0": 8.5, "q6_k": 6.5625, "q5_k_m": 5.69, "q4_k_m": 4.85}
"""Bits per weight of llama.cpp's types (ggml's block sizes; the K mixtures as llama-quantize reports them on 7B)."""


@dataclass(frozen=True)
class Disk:
    """Bytes. `checkpoints`: how many lie there at once, of `checkpoint` bytes each."""

    checkpoint: int
    checkpoints: int
    base: int
    adapter: int
    merged: int
    gguf: int

    @property
    def total(self) -> int:
        """Everything at the end of the run."""
        return self.checkpoint * self.checkpoints + self.base + self.adapter + self.merged + self.gguf


def disk(recipe: Recipe, case: Case, steps: int | None) -> Disk:
    """What lies in the run folder at its end. Without a number of steps, one checkpoint is counted.

    A checkpoint holds what is trained in float32 and the optimizer's states, 12 bytes a weight with AdamW; in full
    tuning the frozen weights as well. One is written every `save_every` steps and at the end; `keep_checkpoints` keeps
    the newest N and the best.
    """
    weights, training = case.weights, recipe.training
    stored = weights.total if weights.full else weights.trained
    states = optimizer(case) * case.engine.optimizer_shards or 2 * FLOAT * weights.trained
    count = max(1, -(-steps // training.save_every)) if steps else 1
    if training.keep_checkpoints is not None:
        best = 1 if recipe.eval_data is not None else 0
        count = min(count, training.keep_checkpoints + best)
    dtype = BYTES[recipe.export.dtype or recipe.model.dtype]
    new = recipe.model.starts_new and not weights.full
    return Disk(
        checkpoint=FLOAT * stored + states,
        checkpoints=count,
        base=BYTES[recipe.model.dtype] * weights.total if new else 0,
        adapter=0 if weights.full else FLOAT * weights.trained,
        merged=dtype * weights.total if recipe.export.merged or weights.full else 0,
        gguf=int(sum(BITS[kind] for kind in recipe.export.gguf) / 8 * weights.total),
    )
