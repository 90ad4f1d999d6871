"""Bytes that each device sends in one optimizer step, from shapes: a calculation. No torch.

A ring over n devices sends (n−1)/n of what is gathered, as much of what is reduced and scattered, and both for an
all-reduce (ZeRO, arXiv 1910.02054 §7). What is sent how often is what the engines do as they are used here, in
accelerate 1.15, transformers 5.23, DeepSpeed 0.19 and torch 2.13, read in their code and held against the bytes that
two and four processes put on the wire (benchmarks/exchange.py). With T trained weights, W all of them as they are sent,
E the embedding and H the head:

    DDP      all-reduce T once a step
    ZeRO-1   all-reduce T once a step, gather T          the paper has a reduce-scatter; DeepSpeed's buckets hold
    ZeRO-2   all-reduce T in every pass, gather T        slices of several owners and go to all of them
    ZeRO-3   reduce-scatter T and gather 2W − E in every pass; what is used again within 1e9 weights is not sent again
    FSDP2    reduce-scatter T and gather 2W − H in every pass; the head stays from forward to backward

Over gloo, torch makes a reduce-scatter of an all-reduce. Some numbers a step that all agree on are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.plan.flops import AGAIN
from llama_ft.plan.memory import Case
from llama_ft.plan.weights import FLOAT

REUSED = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance: weights that so few others come between are not sent again."""


@dataclass(frozen=True)
class Exchange:
    """Bytes per device and step: sent to sum gradients, sent to gather weights, moved to and from main memory."""

    reduced: int
    gathered: int
    host: int

    @property
    def sent(self) -> int:
        """Over the links between devices."""
        return self.reduced + self.gathered


def exchange(case: Case, passes: int, *, near: int = REUSED) -> Exchange:
    """What one device exchanges in a step of so many passes. `near`: DeepSpeed's stage3_max_reuse_distance."""
    engine, trained = case.engine, case.weights.trained
    ring = (engine.devices - 1) / engine.devices
    gradients, weights = trained * gradient_bytes(case), whole_pass(case, near) * passes
    all_reduce, scatter = 2 * ring * gradients, (ring if case.on_gpu else 2 * ring) * gradients
    updated = ring * trained * case.trained_as
    reduced, gathered = {
        "DDP": (all_reduce, 0.0),
        "ZeRO-1": (all_reduce, updated),
        "ZeRO-2": (all_reduce * passes, updated),
        "ZeRO-3": (scatter * passes, ring * weights),
        "FSDP2": (scatter * passes, ring * weights),
        "FSDP": (scatter * passes, ring * weights),
    }.get(engine.name, (0.0, 0.0))
    return Exchange(round(reduced), round(gathered), round(over_host_link(case, passes)))


def gradient_bytes(case: Case) -> int:
    """Bytes of a gradient as it is sent: FSDP2's mixed precision and DeepSpeed's are that of the products."""
    if case.engine.name in ("FSDP2", "FSDP"):
        return case.element if case.on_gpu else FLOAT
    return case.trained_as


def whole_pass(case: Case, near: int = REUSED) -> float:
    """Bytes of weights that a device has gathered in one pass, its own shard of them included.

    A frozen weight is gathered for the backward pass as well. FSDP2 prefetches the embedding backward although nothing
    needs it there; DeepSpeed does not. Recomputed layers are still whole, but for adapters under ZeRO-3: there each is
    gathered a third time (measured, not understood).
    """
    weights, shape = case.weights, case.weights.shape
    if case.engine.weight_shards == 1:
        return 0.0
    table = case.element * shape.vocabulary * shape.hidden
    factors = case.trained_as if case.engine.deepspeed else gradient_bytes(case)
    beside = 0 if weights.full else factors * (weights.trained - weights.trained_whole)
    layers = weights.held(case.element) - case.element * shape.embedding_weights + beside  # quantised: as stored
    if not case.engine.deepspeed:
        return 2 * layers + table * (1 if shape.tied else 3)
    rest = layers + table
    last = near / 2 * rest / (weights.total + (0 if weights.full else weights.trained))  # of the forward pass
    kept = min(rest + (table if shape.tied else 0), last)
    third = 0.0 if weights.full else AGAIN[case.training.gradient_checkpointing] * layers
    return table + 2 * rest - kept + third


def over_host_link(case: Case, passes: int) -> float:
    """Bytes that offloading moves: gradients to main memory, weights from it. Not measured by us.

    Where the weights lie there, a device brings its shard for each gather and takes its gradients back in each pass;
    where the states alone do, the trained weights of its part come back once a step.
    """
    engine, weights = case.engine, case.weights
    if not engine.offload_optimizer:
        return 0.0
    gradients = weights.trained * case.trained_as / engine.devices
    if not engine.offload_weights:
        each = passes if engine.name == "ZeRO-2" else 1
        return gradients * each + weights.trained * case.trained_as / engine.devices
    # FSDP2 casts on the device what it brings there: trained weights come in float32.
    wider = case.held / case.element if engine.name == "FSDP2" else 1.0
    own = whole_pass(case) if engine.devices > 1 else 2.0 * weights.held(case.element)
    return passes * (wider * own / engine.devices + gradients)
