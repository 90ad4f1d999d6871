"""How a batch becomes N tokens without padding, and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


class Packing:
    """How a batch [B, L] lies as N tokens without padding: which tokens, their positions, where documents end."""

    def __init__(self, shape: tuple[int, int], keep: Tensor | None, positions: Tensor, bounds: list[int]):
        self.shape, self.keep, self.positions, self.bounds = shape, keep, positions, bounds

    @classmethod
    def of(
        cls,
        batch: int,
        length: int,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Sequence[int] | Tensor | None,
        device: torch.device,
    ) -> Packing:
        """Reads the layout off whatever the caller gave; see LlamaModel.forward. Host syncs: three at most, once."""
        keep = None
        if cu_seqlens is not None:
            if mask is not None and not bool(mask.all()):
                raise ValueError("cu_seqlens say where documents end: a batch with padding has none")
            bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else [int(bound) for bound in cu_seqlens]
            if bounds[0] != 0 or bounds[-1] != batch * length or any(b <= a for a, b in pairwise(bounds)):
                raise ValueError(f"cu_seqlens must rise from 0 to {batch * length}, got {bounds}")
        elif mask is not None and not bool(mask.all()):
            keep = mask.flatten().nonzero().squeeze(-1)
            bounds = [0, *accumulate(count for count in mask.sum(-1).tolist() if count)]
            if position_ids is not None:
                starts = (position_ids.expand(batch, -1).flatten()[keep] == 0).nonzero().squeeze(-1).tolist()
                bounds = sorted({*bounds, *starts})
        else:
            bounds = list(range(0, batch * length + 1, length))
            if position_ids is not None:
                starts = (position_ids.expand(batch, -1).flatten() == 0).nonzero().squeeze(-1).tolist()
                bounds = sorted({*bounds, *starts})
        if position_ids is not None:
            positions = position_ids.expand(batch, -1).flatten()
            positions = positions if keep is None else positions[keep]
        else:
            positions = torch.cat([torch.arange(b - a, device=device) for a, b in pairwise(bounds)])
        return cls((batch, length), keep, positions, bounds)

    def take(self, tokens: Tensor) -> Tensor:
        """[B, L, …] → [N, …]"""
        tokens = tokens.flatten(0, 1)
        return tokens if self.keep is None else tokens[self.keep]

    def put_back(self, tokens: Tensor) -> Tensor:
        """[N, …] → [B, L, …], padding as zeros."""
        if self.keep is not None:
            full = tokens.new_zeros(self.shape[0] * self.shape[1], *tokens.shape[1:])
            tokens = full.index_copy(0, self.keep, tokens)
        return tokens.unflatten(0, self.shape)
