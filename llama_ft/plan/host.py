"""Resident memory of a CPU run: what stands beside the parts of `memory.py`, and the peak of the export.

Measured on the real command with SmolLM2-135M (docs/plan.md). Weights are mapped from their file where it holds the
type that is computed in, and count as resident all the same. What training frees in small blocks stays with the
process.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.plan.memory import Case, Memory
from llama_ft.plan.time import PROOF_POSITIONS
from llama_ft.plan.weights import FLOAT
from llama_ft.recipe.schema import Recipe

LIBRARIES = 690 * 2**20
"""Python with torch, transformers, TRL, PEFT, datasets and their mapped files, before a weight is read: 684 MiB."""
KEPT = 0.7
"""Share of the activations that the allocator keeps after training: 0.7 in LoRA runs, less in full ones."""
REUSED = 0.5
"""Where a step is one pass, gradients are made while activations are freed, and take the place of about so many."""

BETWEEN = 0.33
"""Of a quantised base: share of the activations that is lost between the blocks of the allocator. Each product unpacks
a weight and frees it among activations that stay; two QLoRA runs took 0.33 and 0.37 more than their parts."""


@dataclass(frozen=True)
class Host:
    """Bytes resident at the peak of training and at that of the export; the run's peak is the larger."""

    training: int
    export: int

    @property
    def peak(self) -> int:
        """The largest that the process ever is."""
        return max(self.training, self.export)


def host(recipe: Recipe, case: Case, parts: Memory, *, stored: str | None, accumulation: int) -> Host:
    """`parts` are a training step's on a CPU; `stored`: the type in the base's file, None where it is not known."""
    weights = case.weights
    training = LIBRARIES + parts.total + stacked(recipe, case, stored)
    if weights.quantised:
        training += int(BETWEEN * parts.activations)
    if accumulation == 1:
        training -= int(REUSED * min(parts.gradients, parts.activations + parts.head))
    if not recipe.export.merged:
        return Host(training, 0)
    # The head's buffers are large blocks and go back to the system; the proof opens a second model in float32 and keeps
    # the logits of both.
    kept = training - parts.head - int((1 - KEPT) * parts.activations)
    reopened = FLOAT * weights.total
    logits = 2 * PROOF_POSITIONS * FLOAT * weights.shape.vocabulary
    return Host(training, kept + reopened + logits)


def stacked(recipe: Recipe, case: Case, stored: str | None) -> int:
    """Copies of q/k/v and of gate/up, one after the other for the fused product, while the file stays mapped.

    Where the weights were converted on loading there is no mapping left, and the copies replace what they copy.
    """
    weights = case.weights
    held = "float32" if case.held == FLOAT else "bfloat16"
    if weights.full or weights.quantised or stored != held or recipe.model.dtype != stored:
        return 0
    sizes = weights.shape.projections
    return (
        case.held * weights.shape.layers * sum(out * into for name, (out, into) in sizes.items() if name not in _ALONE)
    )


_ALONE = ("o_proj", "down_proj")
