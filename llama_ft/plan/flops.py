"""Floating-point operations of a step, from shapes. No torch.

A product of [m, k] with [k, n] is 2·m·n·k FLOP. Per token that is no padding, with B weights in the blocks' linear
layers, Hd = vocabulary × hidden, f the labelled share, s̄ = Σℓ²/Σℓ over documents of ℓ tokens, a = 2·L·d_attn·s̄ for
the causal scores and sums of a forward pass (half of a square), P adapter weights, and R the share of layers that are
computed again (1 with gradient checkpointing, ½ when selective); D, the weights of down_proj, whose product nobody
needs twice: torch stops recomputing at a layer's last input:

    full:  6B + 6f·Hd + 3.5a + R(2B − 2D + a)
    LoRA:  4B + 4f·Hd + 3.5a + 6P + R(2B + 2P + a)

The backward pass of attention costs 2.5 forwards, for the scores are made again (FlashAttention-2, arXiv 2307.08691
§3.1). A frozen weight needs no gradient of its own: 4 instead of 6. The head (llama_ft/llama/head.py) sees labelled
tokens alone. That quantised weights are written out in 16 bits before each product is counted in bytes, not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.plan.weights import Weights
from llama_ft.recipe.schema import Training

AGAIN: dict[bool | str, float] = {False: 0.0, "selective": 0.5, True: 1.0}
"""Share of the layers that gradient checkpointing computes twice."""


@dataclass(frozen=True)
class Tokens:
    """Some documents by their sums: tokens, labelled tokens, and Σℓ²."""

    tokens: float
    labelled: float
    squares: float

    @property
    def mean_context(self) -> float:
        """s̄ = Σℓ²/Σℓ."""
        return self.squares / self.tokens if self.tokens else 0.0


def attention(weights: Weights, squares: float) -> float:
    """Forward FLOP of causal attention within documents: 2·L·(H·d)·Σℓ², the half that a causal kernel computes."""
    shape = weights.shape
    return 2.0 * shape.layers * shape.heads * shape.dim * squares


def forward(weights: Weights, seen: Tokens) -> float:
    """FLOP of an evaluation: (2B + 2P)·tokens + attention + 2·Hd·labelled."""
    body = 2.0 * (weights.shape.linear_weights + weights.lora)
    head = 2.0 * weights.shape.vocabulary * weights.shape.hidden
    return body * seen.tokens + attention(weights, seen.squares) + head * seen.labelled


def training(weights: Weights, seen: Tokens, recipe: Training) -> float:
    """FLOP of forward and backward over some documents, by the formulas at the top."""
    body, head = weights.shape.linear_weights, weights.shape.vocabulary * weights.shape.hidden
    a = attention(weights, seen.squares)
    again = AGAIN[recipe.gradient_checkpointing]
    own = min(weights.trained_whole, body) if weights.full else 0  # linear weights whose own gradient is made
    twice = body - weights.shape.layers * weights.shape.hidden * weights.shape.intermediate if weights.full else body
    per_token = 4.0 * body + 2.0 * own + 6.0 * weights.lora + again * (2.0 * twice + 2.0 * weights.lora)
    per_label = (6.0 if weights.head_trained else 4.0) * head
    return per_token * seen.tokens + per_label * seen.labelled + (3.5 + again) * a


def per_token(weights: Weights, recipe: Training, *, labelled: float, mean_context: float) -> float:
    """The same for one token, as tables give it: `labelled` is f, `mean_context` is s̄."""
    return training(weights, Tokens(1.0, labelled, mean_context), recipe)
