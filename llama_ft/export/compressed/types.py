"""The types of compressed checkpoint that an export makes, and how far each may be from the weights it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from llama_ft.adapters.quantised import is_projection
from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.export.tolerance import Tolerance

GROUPS = (128, 64, 32)
"""Weights in a row that share a scale, the usual number first: those for which vLLM has kernels."""
IGNORED = ("lm_head",)
"""Never rounded: as llm-compressor's own examples have it."""
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "dynamic": False}
_ROWS = {"strategy": "channel", "symmetric": True, "dynamic": False}
_TOKENS = {"strategy": "token", "symmetric": True, "dynamic": True}
_INT8, _FP8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}


@dataclass(frozen=True)
class Compression:
    """A type of checkpoint.

    `method`: llm-compressor's, as scripts/compress.py names it. `weights`, `activations`: compressed-tensors'
    arguments, the group apart; activations None: not rounded. `stored`: safetensors' word for what weights are kept in.
    `folds`: what the method multiplies into other layers before it rounds: nothing, what follows a norm into that norm,
    or (all) v and up as well. Weights are compared with that taken out (llama_ft/export/compressed/weights.py).
    `tolerance`: of the answers, with the weights that the checkpoint stands for. `error`: the largest ‖Ŵ − W‖ / ‖W‖ of
    any projection; `scale`: the largest |⟨W, Ŵ⟩ / ⟨W, W⟩ − 1|. `runtime`: of the answers where activations are rounded
    too. `calibrated`: whether the method looks at documents.
    """

    name: str
    method: Literal["awq", "gptq", "smoothquant+gptq", "round"]
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None
    stored: str
    folds: Literal["nothing", "norms", "all"]
    tolerance: Tolerance
    error: float
    scale: float
    runtime: Tolerance

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at documents."""
        return self.method != "round"

    @property
    def grouped(self) -> bool:
        """Whether weights share scales in groups, which have to divide every row."""
        return self.weights["strategy"] == "group"

    def scheme(self, group: int | None) -> dict[str, Any]:
        """compressed-tensors' arguments, whole. group: as :func:`group_size` has it."""
        weights = {**self.weights, **({"group_size": group} if self.grouped else {})}
        return {"weights": weights, **({"input_activations": dict(self.activations)} if self.activations else {})}


def _limits(kl: float, top1: float) -> Tolerance:
    return Tolerance(max_delta=None, mean_kl=kl, top1=top1, greedy="near ties")


UNROUNDED_ERROR, UNROUNDED_SCALE = 3e-3, 1e-4
"""Of what only goes to 16 bits, as for a bf16 file (llama_ft/export/gguf/formats.py)."""
TYPES = {
    found.name: found
    for found in (
        Compression(
            "w8a8",
            "smoothquant+gptq",
            {**_INT8, **_ROWS},
            {**_INT8, **_TOKENS},
            "I8",
            folds="norms",
            tolerance=_limits(5e-3, 0.9),
            error=0.1,
            scale=5e-3,
            runtime=_limits(0.06, 0.8),
        ),
        Compression(
            "fp8",
            "round",
            {**_FP8, **_ROWS},
            {**_FP8, **_TOKENS},
            "F8_E4M3",
            folds="nothing",
            tolerance=_limits(0.1, 0.8),
            error=0.04,
            scale=4e-3,
            runtime=_limits(0.12, 0.8),
        ),
        Compression(
            "awq",
            "awq",
            {**_INT4, "symmetric": False},
            None,
            "I32",
            folds="all",
            tolerance=_limits(0.4, 0.6),
            error=0.3,
            scale=0.015,
            runtime=_limits(0.4, 0.6),
        ),
        Compression(
            "gptq",
            "gptq",
            {**_INT4, "symmetric": True},
            None,
            "I32",
            folds="nothing",
            tolerance=_limits(0.4, 0.6),
            error=0.6,
            scale=0.02,
            runtime=_limits(0.4, 0.6),
        ),
    )
}
"""By name, the most exact first. What SmolLM2-135M measures, and why these limits, is in docs/compressed.md."""


def check_types(types: Iterable[str]) -> list[Compression]:
    """The types of these names, each once, in the order asked. UserError with the nearest name for each wrong one."""
    names = list(dict.fromkeys(types))
    wrong = [name for name in names if name not in TYPES]
    if wrong:
        raise UserError([Problem(f"no such compressed type '{n}'", hint=did_you_mean(n.lower(), TYPES)) for n in wrong])
    return [TYPES[name] for name in names]


def group_size(widths: Iterable[int], kinds: Iterable[Compression]) -> int:
    """The largest of GROUPS that divides every row of the projections.

    widths: of their rows. kinds: those asked for, of which the ones without groups fit any row. UserError where none
    fits.
    """
    rows = sorted(set(widths))
    for group in GROUPS:
        if all(width % group == 0 for width in rows):
            return group
    asked = [kind.name for kind in kinds if kind.grouped]
    if asked:
        odd = next(width for width in rows if width % GROUPS[-1])
        raise UserError(
            f"{', '.join(asked)}: no group of {', '.join(map(str, GROUPS))} weights divides rows of {odd}",
            hint="ask for w8a8 or fp8, which have a scale for each row",
        )
    return GROUPS[-1]


def compressed_bytes(shapes: Mapping[str, tuple[int, ...]], kind: Compression, group: int) -> int:
    """Bytes of the weight files of a checkpoint, a little more than they will take."""
    total = 0.0
    for name, shape in shapes.items():
        bits: float = 16
        if is_projection(name):
            # Of a group: a scale of 16 bits, a zero of 4; of a row: a scale.
            bits = kind.weights["num_bits"] + (20 / group if kind.grouped else 16 / shape[-1])
        total += prod(shape) * bits / 8
    return int(total) + 2**20
