"""Seconds of a decoded token: every weight is read, every layer is called, and more answers at once multiply more."""

from __future__ import annotations

import math

from llama_ft.plan.memory import Case
from llama_ft.plan.speed import Speed
from llama_ft.plan.weights import FLOAT

DECODE_LAYER = 1.5e-3
"""Seconds that a layer takes to decode one token beside reading its weights: calls of small kernels."""
FEW, MANY = 5, 64
"""Answers at once up to which products run at the rate of few rows, and from which on at that of many. Between them it
rises with the logarithm: SmolLM2's products on a core of a Xeon reached 11, 30, 49 and 67 % of their rate at 512 rows
with 5, 16, 32 and 64."""


def decode(case: Case, speed: Speed, rows: float) -> float:
    """Seconds of one token of each of `rows` answers at once."""
    weights = case.weights
    # On a CPU quantised weights are unpacked to decode (llama_ft.adapters.quantised.unpacked).
    read = FLOAT * weights.total if weights.quantised and not case.on_gpu else weights.held(case.held)
    calls = DECODE_LAYER * weights.shape.layers
    rise = min(1.0, max(0.0, math.log(max(rows, 1) / FEW) / math.log(MANY / FEW)))
    rate = speed.few_rows + rise * (speed.forward - speed.few_rows)
    return read / speed.bandwidth + calls + 2 * weights.total * (rows - 1) / rate
