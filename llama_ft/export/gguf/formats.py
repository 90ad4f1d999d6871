"""The types of GGUF file that an export writes, and how far each may be from the weights it was made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.export.tolerance import Tolerance
from llama_ft.llama.checkpoints.gguf import NAMES

_BLOCK = 256
"""Weights in a block of a k-quant. llama.cpp stores rows that are no multiple of it in a wider type."""
_WIDER_BITS = 8.5
"""Of the widest of those, q8_0."""


@dataclass(frozen=True)
class Format:
    """A type of file. `bits`: per weight of llama.cpp's mixture on a 7B, scales included.

    `tolerance`: of the answers (llama_ft.export.tolerance). `error`: the largest ‖Ŵ − W‖ / ‖W‖ of any tensor, W as
    merged and Ŵ as the file holds it; `scale`: the largest |⟨W, Ŵ⟩ / ⟨W, W⟩ − 1|, which rounding hardly moves.
    `runtime`: of llama.cpp's own answers from the file.
    `by_converter`: the converter writes it by itself; else the quantiser makes it of what the converter wrote.
    """

    name: str
    bits: float
    tolerance: Tolerance
    error: float
    scale: float
    runtime: Tolerance
    by_converter: bool = False


def _limits(kl: float, top1: float) -> Tolerance:
    return Tolerance(max_delta=None, mean_kl=kl, top1=top1, greedy="near ties")


_EXACT = Tolerance(max_delta=1e-3, mean_kl=None, top1=None, greedy="equal")
FORMATS = {
    found.name: found
    for found in (
        Format("f32", 32, _EXACT, error=1e-7, scale=1e-7, runtime=_limits(1e-4, 0.99), by_converter=True),
        Format("bf16", 16, _limits(1e-3, 0.99), error=3e-3, scale=1e-4, runtime=_limits(2e-3, 0.98), by_converter=True),
        Format("f16", 16, _limits(1e-4, 0.99), error=4e-4, scale=1e-5, runtime=_limits(1e-3, 0.98), by_converter=True),
        Format("q8_0", 8.5, _limits(5e-3, 0.9), error=0.015, scale=2e-3, runtime=_limits(0.02, 0.9), by_converter=True),
        Format("q6_k", 6.5625, _limits(0.02, 0.85), error=0.035, scale=2e-3, runtime=_limits(0.04, 0.85)),
        Format("q5_k_m", 5.69, _limits(0.1, 0.8), error=0.075, scale=0.01, runtime=_limits(0.12, 0.75)),
        Format("q4_k_m", 4.85, _limits(0.2, 0.7), error=0.13, scale=0.01, runtime=_limits(0.25, 0.7)),
    )
}
"""By name, the most exact first. What SmolLM2-135M measures is in docs/gguf.md, with the reasons for the limits."""


def check_types(types: Iterable[str], *, key: str | None = None) -> list[Format]:
    """The formats of these names, each once, in the order asked. UserError with the nearest name for each wrong one."""
    names = list(dict.fromkeys(types))
    wrong = [name for name in names if name not in FORMATS]
    if wrong:
        raise UserError(
            [Problem(f"no such GGUF type '{n}'", key=key, hint=did_you_mean(n.lower(), FORMATS)) for n in wrong]
        )
    return [FORMATS[name] for name in names]


def file_bytes(shapes: Mapping[str, tuple[int, ...]], kind: Format) -> int:
    """Bytes of the tensors of a file, a little more than it will take: what has to be free on the disk."""
    total = 0.0
    for name, shape in shapes.items():
        if len(shape) == 1:
            bits = 32.0
        elif kind.by_converter:
            bits = kind.bits
        elif shape[-1] % _BLOCK:
            bits = max(kind.bits, _WIDER_BITS)
        else:  # mixtures keep the embedding and the head in q6_k
            bits = FORMATS["q6_k"].bits if "embed" in name or "head" in name else 1.05 * kind.bits
        total += prod(shape) * bits / 8
    return int(total)


def stated_types(shapes: Mapping[str, tuple[int, ...]], kind: Format) -> list[tuple[str, str]]:
    """(pattern of a tensor's name in the file, type) where llama.cpp's own choice is not taken.

    For rows that are no multiple of 256 a q5_k_m falls back on q5_1, which begins at the smallest weight of a block.
    Weights that had 4 bits before, such as SmolLM2-135M's here, lie on a grid that q5_1's pushes apart: all of a tensor
    came out 1.9 % too large, and the mean KL was 0.165 nats. With q5_0, and q8_0 for the small v, it is 0.020, in fewer
    bytes.
    """
    if kind.name != "q5_k_m":
        return []
    odd = [name for name, shape in shapes.items() if name.startswith("model.layers.") and shape[-1] % _BLOCK]
    return [
        (f"^{re.escape(NAMES.of(name))}$", "Q8_0" if "v_proj" in name else "Q5_0")
        for name in odd
        if len(shapes[name]) > 1
    ]
