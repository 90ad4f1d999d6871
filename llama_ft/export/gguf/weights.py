"""The weights that a file holds beside those of merged/: model-free, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llama_ft.export.gguf.formats import Format
from llama_ft.export.job import finite
from llama_ft.llama.checkpoints.layout import Weights
from llama_ft.llama.checkpoints.shards import stored_tensors

_SLAB = 4 << 20


def weight_distances(weights: Weights, merged: Path) -> dict[str, Any]:
    """The largest error and the largest change of scale of any tensor, and which tensors those are (see Format)."""
    stored = stored_tensors(merged)
    worst = {"error": (0.0, ""), "scale": (0.0, "")}
    for name in weights.shapes:
        with safe_open(stored[name].file, framework="pt") as source:
            right = source.get_tensor(name)
        error, scale = distance(right, weights.read(name))
        for key, value in (("error", error), ("scale", abs(scale - 1))):
            if not value <= worst[key][0]:  # a NaN is the worst of all, and stays
                worst[key] = (value, name)
    return {
        "largest_error": finite(worst["error"][0]),
        "largest_error_in": worst["error"][1],
        "largest_scale_error": finite(worst["scale"][0]),
        "largest_scale_error_in": worst["scale"][1],
    }


def distance(right: Tensor, left: Tensor) -> tuple[float, float]:
    """‖left − right‖ / ‖right‖, and ⟨right, left⟩ / ⟨right, right⟩, in float64."""
    apart = own = common = 0.0
    for x, y in zip(right.reshape(-1).split(_SLAB), left.reshape(-1).split(_SLAB), strict=True):
        p, q = x.double(), y.double()
        apart += float((p - q).square().sum())
        own += float(p.square().sum())
        common += float((p * q).sum())
    if own == 0:
        return (0.0, 1.0) if apart == 0 else (float("inf"), float("inf"))
    return (apart / own) ** 0.5, common / own


def weight_faults(found: dict[str, Any], kind: Format) -> list[str]:
    """Which tensor is farther from merged/ than rounding to this type takes it; empty = none."""
    faults = []
    for key, limit, what in (
        ("largest_error", kind.error, "‖Ŵ − W‖ / ‖W‖"),
        ("largest_scale_error", kind.scale, "|⟨W, Ŵ⟩ / ⟨W, W⟩ − 1|"),
    ):
        value = found[key]
        if value is None or value > limit:
            shown = "not finite" if value is None else f"{value:.3g}"
            faults.append(f"{found[key + '_in']}: {what} is {shown}, allowed {limit:g}")
    return faults
