"""Rotary position embedding: each pair of features (j, j + d/2) of a head is turned by the angle position · θ^(−2j/d).

Source: RoFormer, arXiv 2104.09864; LLaMA uses θ = 10,000 (1 and 2), 500,000 (3), 1,000,000 (Code Llama).
Scaled variants take their frequencies from transformers, so that the numbers are the same: `linear` divides them by the
factor (2306.15595), `yarn` and `llama3` divide the slow ones alone (2309.00071; Llama 3.1), `dynamic` raises θ with the
length of the sequence once that exceeds max_position_embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin for given positions.

    The inverse frequencies are a non-persistent float32 buffer: no checkpoint holds them, and casting the model to a
    16-bit type must not touch them (positions beyond 256 would collide in bfloat16).
    """

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig, device: torch.device | None = None):
        super().__init__()
        self.config = config
        self.rope: dict[str, Any] = dict(config.rope_parameters or {})
        self.rope_type: str = self.rope.get("rope_type", "default")
        inv_freq, self.attention_scaling = self.frequencies(device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self, device: torch.device | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies [head_dim / 2] in float32, and the factor on cos and sin (1 except for yarn)."""
        if self.rope_type == "default":
            head_dim = getattr(self.config, "head_dim", None) or (
                self.config.hidden_size // self.config.num_attention_heads
            )
            exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
            return 1.0 / self.rope["rope_theta"] ** exponent, 1.0
        if self.rope_type not in ("linear", "dynamic", "yarn", "llama3"):
            raise ValueError(f"rope_type '{self.rope_type}' is not supported: use linear, dynamic, yarn or llama3")
        return ROPE_INIT_FUNCTIONS[self.rope_type](self.config, device)

    def stretched(self, length: int, device: torch.device) -> Tensor:
        """`dynamic`: the inverse frequencies of a sequence of `length` tokens; the plain ones where it fits.

        θ′ = θ · (f·length/L − (f − 1))^(d / (d − 2)) for a factor f, a context L and d features per head.
        """
        if length <= self.config.max_position_embeddings:
            return self.inv_freq
        # transformers hands a tensor over, and so computes θ′ in float32.
        return ROPE_INIT_FUNCTIONS["dynamic"](self.config, device, seq_len=torch.tensor(length, device=device))[0]

    def _apply(self, fn, recurse=True):
        """Moves with the model but keeps float32 through `.to(bfloat16)`; leaves the meta device with real values."""
        was_meta = self.inv_freq.is_meta
        super()._apply(fn, recurse)
        if (was_meta and not self.inv_freq.is_meta) or self.inv_freq.dtype != torch.float32:
            self.inv_freq = self.frequencies(self.inv_freq.device)[0]
        return self

    @torch.no_grad()
    def forward(
        self, positions: Tensor, dtype: torch.dtype, bounds: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, each [N, 1, head_dim / 2] in `dtype`, for positions [N]. Angles are computed in float32.

        bounds: where documents lie, 0 = b₀ < b₁ < … = N. `dynamic` frequencies follow the length of each document
        alone, and without bounds (generation) the longest position so far; other types do not look at them.
        """
        places = positions.to(torch.float32)[:, None, None]
        angles = places * self.inv_freq if self.rope_type != "dynamic" else self._dynamic(places, bounds)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _dynamic(self, places: Tensor, bounds: Sequence[int] | None) -> Tensor:
        if bounds is None:
            return places * self.stretched(int(places.max()) + 1, places.device)
        lasts = places[[stop - 1 for stop in bounds[1:]]].flatten().tolist()  # one sync for all documents
        parts = [
            places[start:stop] * self.stretched(int(last) + 1, places.device)
            for (start, stop), last in zip(pairwise(bounds), lasts, strict=True)
        ]
        return torch.cat(parts)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns heads [N, H, D] in place by cos and sin [N, 1, D / 2]; pass −sin to turn back. No autograd.

    16-bit heads are turned in float32 and rounded once.
    """
    if heads.dtype.itemsize < 4:
        return heads.copy_(rotate_(heads.float(), cos, sin))
    first, second = heads.chunk(2, dim=-1)
    old_first = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(old_first, sin)
    return heads


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as :func:`rotate_`, out of place and differentiable."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
