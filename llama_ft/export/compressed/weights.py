"""The weights that a compressed checkpoint stands for beside those of merged/, one layer's part in memory at a time.

AWQ (arXiv 2306.00978) and SmoothQuant (2211.10438) multiply columns of a projection by s and divide what feeds them by
s before they round, which changes every weight and no answer. So what is compared is what s leaves alone:

- behind a norm with weights n, W·diag(n): s is in W, 1/s in n;
- for up and v (`all`), rows at any scale: the least squares t of each row, û ≈ t·u, is taken out;
- for down and o behind them, W·diag(t): what a row lost, its column has.

o takes part where v has as many rows as o columns, which is where AWQ folds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama_ft.adapters.quantised import is_projection
from llama_ft.export.compressed.types import UNROUNDED_ERROR, UNROUNDED_SCALE, Compression
from llama_ft.export.gguf.weights import distance, worse
from llama_ft.export.job import finite
from llama_ft.llama.checkpoints.shards import Stored, stored_tensors

_NORMS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
_FEEDS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Compared:
    """`worst`: measure → (value, tensor it is of); `rounded`, `kept`: of projections and of all else."""

    rounded: dict[str, tuple[float, str]]
    kept: dict[str, tuple[float, str]]

    def facts(self) -> dict[str, Any]:
        """For export.json."""
        found: dict[str, Any] = {}
        for prefix, worst in (("", self.rounded), ("unrounded_", self.kept)):
            for key, (value, name) in worst.items():
                found |= {f"{prefix}largest_{key}": finite(value), f"{prefix}largest_{key}_in": name}
        return found


def compare_weights(plain: Path, merged: Path, kind: Compression) -> Compared:
    """The largest error and change of scale of any tensor, of projections and of the rest, and which tensors those are.

    plain: the checkpoint, decompressed; it has the tensors of merged/.
    """
    ours, theirs = stored_tensors(merged), stored_tensors(plain)
    right_of, left_of = _reader(ours), _reader(theirs)
    found = Compared(*({"error": (0.0, ""), "scale_error": (0.0, "")} for _ in range(2)))
    for name in ours:
        pair = _pair(name, right_of, left_of, ours, kind)
        if pair is None:
            continue
        error, scale = distance(*pair)
        worst = found.rounded if is_projection(name) else found.kept
        for key, value in (("error", error), ("scale_error", abs(scale - 1))):
            if worse(value, worst[key][0]):
                worst[key] = (value, name)
    return found


def _reader(stored: dict[str, Stored]) -> Read:
    def read(name: str) -> Tensor:
        with safe_open(stored[name].file, framework="pt") as source:
            return source.get_tensor(name).float()

    return read


def _pair(
    name: str, right_of: Read, left_of: Read, stored: dict[str, Stored], kind: Compression
) -> tuple[Tensor, Tensor] | None:
    """A tensor as merged and as compressed, what was folded taken out; None for a norm, which is in what follows it."""
    layer, part = _place(name)
    if kind.folds == "nothing" or not layer:
        return right_of(name), left_of(name)
    if part in _NORMS.values():
        return None
    if part in _NORMS:
        right, left = (_behind_norm(layer, part, read) for read in (right_of, left_of))
        if kind.folds == "all" and any(_folded(layer, fed, stored) for fed, by in _FEEDS.items() if by == part):
            left = left / row_scales(right, left)[:, None]
        return right, left
    right, left = right_of(name), left_of(name)
    if kind.folds == "all" and part in _FEEDS and _folded(layer, part, stored):
        left = left * row_scales(*(_behind_norm(layer, _FEEDS[part], read) for read in (right_of, left_of)))
    return right, left


def _place(name: str) -> tuple[str, str]:
    """("model.layers.0.", "mlp.up_proj"); ("", …) for what is in no layer, and for a bias."""
    head, dot, part = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
    if not name.startswith("model.layers.") or not name.endswith(".weight"):
        return "", name
    return f"model.layers.{head}{dot}", part


def _folded(layer: str, part: str, stored: dict[str, Stored]) -> bool:
    """Whether as many rows feed a projection as it has columns: not where several heads share one of v's."""
    return stored[f"{layer}{part}.weight"].shape[1] == stored[f"{layer}{_FEEDS[part]}.weight"].shape[0]


def _behind_norm(layer: str, part: str, read: Read) -> Tensor:
    return read(f"{layer}{part}.weight") * read(f"{layer}{_NORMS[part]}.weight")


def row_scales(right: Tensor, left: Tensor) -> Tensor:
    """t of each row [out], left ≈ t·right in the sense of least squares: ⟨right, left⟩ / ⟨right, right⟩; 1 for 0."""
    own = right.square().sum(1)
    return torch.where(own > 0, (right * left).sum(1) / own, 1.0)


def weight_faults(found: Compared, kind: Compression) -> list[str]:
    """Which tensor is farther from merged/ than rounding to this type takes it; empty = none."""
    faults = []
    for worst, error, scale in (
        (found.rounded, kind.error, kind.scale),
        (found.kept, UNROUNDED_ERROR, UNROUNDED_SCALE),
    ):
        for key, limit, what in (("error", error, "‖Ŵ − W‖ / ‖W‖"), ("scale_error", scale, "|⟨W, Ŵ⟩ / ⟨W, W⟩ − 1|")):
            value, name = worst[key]
            if not value <= limit:
                shown = "not finite" if finite(value) is None else f"{value:.3g}"
                faults.append(f"{name}: {what} is {shown}, allowed {limit:g}")
    return faults
