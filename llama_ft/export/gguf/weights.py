"""The weights that a file holds beside those of merged/: model-free, one tensor in memory at a time."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from llama_ft.export.gguf.formats import Format
from llama_ft.export.job import finite
from llama_ft.export.kept import LEAST, Kept
from llama_ft.llama.checkpoints.layout import Weights
from llama_ft.llama.checkpoints.shards import stored_tensors

_SLAB = 4 << 20


def weight_distances(weights: Weights, merged: Path) -> dict[str, Any]:
    """The largest error and the largest change of scale of any tensor, and which tensors those are (see Format).

    Of an adapter's run also the share of what was learnt that is still there (llama_ft/export/kept.py), else None.
    """
    stored, kept = stored_tensors(merged), Kept.of(merged)
    worst = {"error": (0.0, ""), "scale": (0.0, "")}
    for name in weights.shapes:
        with safe_open(stored[name].file, framework="pt") as source:
            right = source.get_tensor(name)
        left = weights.read(name)
        error, scale = distance(right, left)
        if kept is not None:
            kept.add(name, right, left)
        for key, value in (("error", error), ("scale", abs(scale - 1))):
            if worse(value, worst[key][0]):
                worst[key] = (value, name)
    return {
        "largest_error": finite(worst["error"][0]),
        "largest_error_in": worst["error"][1],
        "largest_scale_error": finite(worst["scale"][0]),
        "largest_scale_error_in": worst["scale"][1],
        "learnt_kept": finite(kept.share) if kept is not None else None,
    }


def worse(value: float, than: float) -> bool:
    """Whether a measurement takes the place of the worst so far; a NaN is the worst of all, and stays."""
    return not isnan(than) and not value <= than


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
    share = found.get("learnt_kept")
    if share is not None and not share >= LEAST:
        faults.append(f"{share:.1%} of what training added to the weights is left, at least {LEAST:.0%} is wanted")
    return faults
