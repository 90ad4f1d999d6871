"""Shapes for a number of parameters: the family's own that are nearest, and a new one drawn as LLaMA draws them.

LLaMA's four (arXiv 2302.13971, table 2) have heads of 128 features, as many for keys and values, an inner width of 8/3
of the hidden one rounded up to a multiple of 256 (the released code's `multiple_of`), and are 128 times as wide as deep
up to 13B, 102 times at 65B. 33B lies on the line between (111 against 113), in the logarithm of the parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama_ft.llama.shapes import PRESETS, Shape
from llama_ft.plan.flops import per_token
from llama_ft.plan.weights import Weights
from llama_ft.recipe.schema import Adapter, Training

VOCABULARY, CONTEXT = 32_000, 2048
"""LLaMA's tokenizer and the length of what it was trained on (arXiv 2302.13971 §2.1 and its released params)."""
HEAD, SMALL_HEAD = 128, 64
"""Features per head: LLaMA's, and TinyLlama's and SmolLM2's, for a width below 2,048."""
MULTIPLE = 256
"""What the inner width is a multiple of; above `HEAD`·16 the hidden one is as well, as all published ones are."""
ASPECT = ((13.0e9, 128.0), (65.3e9, 102.4))
"""(parameters, width / layers) of LLaMA 13B and 65B."""
LONGEST = 8192
"""Rows of training are counted as long as the published context, at most these: Llama 3's (arXiv 2407.21783 §3.4.1),
whose longer contexts were trained afterwards."""
WIDEST = 2**18
"""Enough for the 1e15 parameters that may be asked for."""
TOLERANCE = 0.05
"""How far the parameters of a suggested shape may be from those that were asked for."""


def inner_width(width: int) -> int:
    """8/3 of a width, rounded up to a multiple of 256: 11008 of 4096, 22016 of 8192."""
    return -(-int(8 * width / 3) // MULTIPLE) * MULTIPLE


def aspect(parameters: float) -> float:
    """Width / layers of a LLaMA of so many parameters."""
    (small, wide), (large, deep) = ASPECT
    along = math.log(parameters / small) / math.log(large / small)
    return wide + (deep - wide) * min(1.0, max(0.0, along))


def suggest(parameters: float) -> Shape | None:
    """A LLaMA of about so many parameters, with LLaMA's 32,000 tokens; None where the embedding alone has more.

    Of all widths with their best number of layers the one for which |ln P/N| + |ln (width/layers)/aspect| is least.
    """
    best: tuple[float, Shape] | None = None
    width = SMALL_HEAD
    while width <= WIDEST:
        large = width >= 16 * HEAD
        heads = width // (HEAD if large else SMALL_HEAD)
        one = Shape(width, 1, heads, heads, inner_width(width), VOCABULARY, CONTEXT)
        block = one.linear_weights + 2 * width
        layers = max(1, round((parameters - one.embedding_weights - width) / block))
        shape = Shape(width, layers, heads, heads, one.intermediate, VOCABULARY, CONTEXT)
        off = abs(math.log(shape.parameters / parameters))
        score = off + abs(math.log(width / layers / aspect(parameters)))
        if off <= math.log1p(TOLERANCE) and (best is None or score < best[0]):
            best = score, shape
        width += MULTIPLE if large else SMALL_HEAD
    return best[1] if best is not None else None


def exact_flops(shape: Shape, context: int) -> float:
    """FLOP of training on one token in rows of `context`: 6B + 6·Hd + 3.5a of llama_ft/plan/flops.py.

    The blocks' products and the head's on every token, and causal attention with its scores made twice, as
    FlashAttention-2 does; looking up an embedding costs nothing, and no layer is computed again.
    """
    weights = Weights(shape, Adapter(method="full"))
    return per_token(weights, Training(gradient_checkpointing=False), labelled=1.0, mean_context=context)


@dataclass(frozen=True)
class Named:
    """A published shape: `name` as in preset:NAME."""

    name: str
    shape: Shape

    @property
    def context(self) -> int:
        """Tokens of a row in training."""
        return min(self.shape.original_context, LONGEST)


def nearest_presets(parameters: float, count: int = 5) -> list[Named]:
    """The presets of nearest size by its logarithm, small to large; of several of one size the oldest.

    Left out: `tiny`, which is for tests, and Code Llama, which went on from Llama 2's weights.
    """
    found: dict[int, Named] = {}
    for name, shape in PRESETS.items():
        if name != "tiny" and not name.startswith("code-"):
            found.setdefault(shape.parameters, Named(name, shape))
    near = sorted(found.values(), key=lambda one: abs(math.log(one.shape.parameters / parameters)))[:count]
    return sorted(near, key=lambda one: one.shape.parameters)
