"""What one device does in a second: of a CPU by a measurement, of a GPU by its vendor's rate and a published share."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.plan.hardware import Card
from llama_ft.plan.memory import Case
from llama_ft.plan.probe import Rates

OF_G = {"fused": 0.68, "plain": 0.50, "full": 0.55, "forward": 0.70, "few rows": 0.16}
"""CPU: share of G that a step reaches: the fused LoRA product, PEFT's own forward (DoRA, dropout, quantised), full
tuning; an evaluation; and the few rows of a decoding step. From runs of SmolLM2-135M (docs/plan.md)."""
OF_CARD = ((900e12, 0.36), (0.0, 0.50))
"""GPU: share of the dense bfloat16 rate, by the card's rate. Fast cards: torchtitan's 6,667 tokens/s per H100 in full
tuning of 8B; others: torchtune's 3,083 tokens/s for LoRA of 8B on a 4090 (56 %) and 2,413 for QLoRA (44 %)."""
START = 12.5
"""Start of launcher and trainer, the plan they make, and their end, in multiples of `import torch` on that machine."""
GPU_START = 60.0
"""Seconds until the first step on a GPU: imports, CUDA, weights read; not yet measured by us."""


@dataclass(frozen=True)
class Speed:
    """What one device does: FLOP/s in training, in evaluation, in decoding several answers; bytes/s of its memory;
    seconds of the start."""

    training: float
    forward: float
    few_rows: float
    bandwidth: float
    start: float
    source: str


def cpu_speed(case: Case, rates: Rates, dtype: str) -> Speed:
    """Of a CPU whose products were measured, in the type that training multiplies in."""
    kind = "full" if case.weights.full else "fused" if case.fused else "plain"
    g = rates.flops[dtype]
    where = f"{dtype} on {rates.threads} threads"
    source = f"measured here just now: {g / 1e9:.0f} GFLOP/s in {where}, of which {OF_G[kind]:.0%}"
    training, forward, few_rows = (g * OF_G[name] for name in (kind, "forward", "few rows"))
    return Speed(training, forward, few_rows, rates.bandwidth, START * rates.imported, source)


def card_speed(card: Card, case: Case) -> Speed:
    """Of a GPU by its vendor's rate and the share of it that others have published."""
    share = next(share for least, share in OF_CARD if card.flops >= least)
    if case.weights.quantised:
        share *= 0.44 / 0.56
    source = f"{card.flops / 1e12:.0f} TFLOP/s dense bfloat16 ({card.source}), of which {share:.0%}; not run by us"
    rate = card.flops * share
    return Speed(rate, rate, rate, card.bandwidth, GPU_START, source)
