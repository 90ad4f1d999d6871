"""How a batch becomes N tokens without padding, and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor


class Packing:
    """How a batch [B, L] lies as N tokens without padding: which tokens, their positions, where documents end.

    Documents that begin with the same prompt may share it: a segment for the prompt, and one for each end.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        keep: Tensor | None,
        positions: Tensor,
        bounds: list[int],
        shared: list[int] | None = None,
    ):
        self.shape, self.keep, self.positions, self.bounds, self.shared = shape, keep, positions, bounds, shared

    @classmethod
    def of(
        cls,
        batch: int,
        length: int,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Sequence[int] | Tensor | None,
        device: torch.device,
        shared: Sequence[int] | Tensor | None = None,
    ) -> Packing:
        """Reads the layout off whatever the caller gave, see LlamaModel.forward. Waits for the device."""
        keep = None if mask is None or bool(mask.all()) else mask.flatten().nonzero().squeeze(-1)
        positions = None if position_ids is None else position_ids.expand(batch, -1).flatten()
        if positions is not None and keep is not None:
            positions = positions[keep]
        if cu_seqlens is not None:
            if keep is not None:
                raise ValueError("cu_seqlens say where documents end: a batch with padding has none")
            bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else [int(bound) for bound in cu_seqlens]
            if bounds[0] != 0 or bounds[-1] != batch * length or any(b <= a for a, b in pairwise(bounds)):
                raise ValueError(f"cu_seqlens must rise from 0 to {batch * length}, got {bounds}")
        else:
            lengths = [length] * batch if mask is None or keep is None else mask.sum(-1).tolist()
            bounds = [0, *accumulate(count for count in lengths if count)]
            if positions is not None:
                bounds = sorted({*bounds, *(positions == 0).nonzero().squeeze(-1).tolist()})
        prompts = None if shared is None else _prompts(shared, bounds, cu_seqlens is not None)
        if positions is None:
            before = [0] * (len(bounds) - 1)
            if prompts is not None:  # an end goes on where its prompt stops
                before = [bounds[prompt + 1] - bounds[prompt] if prompt >= 0 else 0 for prompt in prompts]
            spans = zip(before, pairwise(bounds), strict=True)
            positions = torch.cat([torch.arange(first, first + b - a, device=device) for first, (a, b) in spans])
        return cls((batch, length), keep, positions, bounds, prompts)

    def places(self, rows: Tensor) -> Tensor:
        """Where tokens of the batch, counted as in [B · L], stand among the N. ValueError for padding."""
        if self.keep is None:
            return rows
        places = torch.searchsorted(self.keep, rows).clamp(max=len(self.keep) - 1)
        if not torch.equal(self.keep[places], rows):
            raise ValueError("rows must be tokens, not padding")
        return places

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


def _prompts(shared: Sequence[int] | Tensor, bounds: list[int], told_apart: bool) -> list[int] | None:
    """`shared` as numbers, None where nobody shares. ValueError unless each is −1 or a segment that stands alone."""
    prompts = shared.tolist() if isinstance(shared, Tensor) else [int(prompt) for prompt in shared]
    if not told_apart or len(prompts) != len(bounds) - 1:
        raise ValueError(f"shared needs cu_seqlens, and one number for each of its {len(bounds) - 1} segments")
    for prompt in prompts:
        if prompt != -1 and not (0 <= prompt < len(prompts) and prompts[prompt] == -1):
            raise ValueError(f"shared must be -1 or the number of a segment that shares none, got {prompts}")
    return prompts if any(prompt >= 0 for prompt in prompts) else None
