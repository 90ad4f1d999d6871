"""How much of what an adapter learnt is still in a rounded copy of the merged weights.

An adapter changes a weight by less than the steps of few bits. Where the weight lies anywhere between two of them, the
change survives on average all the same: some values cross over to the next one. Where it lies on them, as a QLoRA's
base lies on NF4's, none does: the copy is the base again, and looks as good as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llama_ft.adapters.lora_file import LoraFile, read_lora
from llama_ft.adapters.rows import row_parts

LEAST = 0.5
"""Of a share that is 1 but for noise where rounding takes nothing, and 0 where it takes all."""


@dataclass
class Kept:
    """Adds up ⟨D, D⟩ and ⟨Ŵ − W, D⟩ in float64, with D = s·B·A: what training added to the weight W."""

    adapter: LoraFile
    own: float = 0.0
    lost: float = 0.0

    @classmethod
    def of(cls, merged: Path) -> Kept | None:
        """For the run that `merged` lies in; None where nothing was added as s·B·A (full tuning, DoRA)."""
        folder = merged.parent / "adapter"
        if not (folder / "adapter_model.safetensors").is_file():
            return None
        adapter = read_lora(folder)
        return None if adapter.magnitudes or not adapter.factors else cls(adapter)

    def add(self, name: str, merged: Tensor, found: Tensor) -> None:
        """Takes a weight as merged and as found again, [out, in]; one without factors counts for nothing."""
        if name not in self.adapter.factors:
            return
        down, up = (factor.double() for factor in self.adapter.factors[name])
        for rows in row_parts(tuple(merged.shape)):
            added = self.adapter.scale * (up[rows] @ down)
            self.own += float(added.square().sum())
            self.lost += float(((found[rows].double() - merged[rows].double()) * added).sum())

    @property
    def share(self) -> float | None:
        """Of what was learnt, how much is there; None before any weight came."""
        return 1 + self.lost / self.own if self.own else None

    def faults(self) -> list[str]:
        """Says so where most of it is gone, or cannot be told."""
        if self.share is None or self.share >= LEAST:
            return []
        what = f"its rounding keeps {self.share:.1%} of what training added to the weights"
        return [f"{what}, at least {LEAST:.0%} is wanted: the weights lay on such values before"]
