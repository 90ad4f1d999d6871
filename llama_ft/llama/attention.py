"""Causal attention within each document, over tokens that lie end to end without padding; and over a KV cache.

A batch without a cache is always seen as N tokens of several documents (`Packed`): a padded batch has its padding
taken out first, a plain [B, L] batch is B documents of length L. No token ever attends to another document, because
no product between two documents is ever formed: there is no mask that could be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from llama_ft.llama.rope import rotate, rotate_


@dataclass(frozen=True)
class Heads:
    """Shape of the attention: query heads, key/value heads (grouped queries, arXiv 2305.13245), features per head."""

    query: int
    key_value: int
    dim: int

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q [N, H, D], k and v [N, KV, D] of a stacked projection [N, (H + 2·KV)·D]."""
        heads = qkv.unflatten(-1, (-1, self.dim))
        return heads.split((self.query, self.key_value, self.key_value), dim=-2)


def _kernel_layout(heads: Tensor, start: int, stop: int) -> Tensor:
    """Tokens start..stop of [N, H, D] as the kernels' [1, H, L, D]; a view."""
    return heads[start:stop].transpose(0, 1).unsqueeze(0)


class _RotaryAttentionCPU(torch.autograd.Function):
    """RoPE in place, then one causal flash kernel per document, forward and backward into one buffer each.

    Keeping the rotation inside spares two copies of q and k, and hands the projection's backward one stacked gradient.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, bounds: Sequence[int], heads: Heads) -> Tensor:
        # qkv is the projection's fresh output and nobody else's; under no_grad here the rotation may overwrite it.
        q, k, v = heads.split(qkv)
        rotate_(q, cos, sin)
        rotate_(k, cos, sin)
        out = torch.empty_like(q)
        logsumexp = []
        for start, stop in pairwise(bounds):
            parts = (_kernel_layout(t, start, stop) for t in (q, k, v))
            result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, True)
            _kernel_layout(out, start, stop).copy_(result)
            logsumexp.append(lse)
        ctx.bounds, ctx.heads = bounds, heads
        ctx.save_for_backward(qkv, cos, sin, out, *logsumexp)
        return out.flatten(-2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        qkv, cos, sin, out, *logsumexp = ctx.saved_tensors
        heads: Heads = ctx.heads
        grad = grad.unflatten(-1, (-1, heads.dim))
        q, k, v = heads.split(qkv)
        grad_qkv = torch.empty_like(qkv)
        grads = heads.split(grad_qkv)
        for (start, stop), lse in zip(pairwise(ctx.bounds), logsumexp, strict=True):
            g, q_, k_, v_, o = (_kernel_layout(t, start, stop) for t in (grad, q, k, v, out))
            results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q_, k_, v_, o, lse, 0.0, True
            )
            for target, result in zip(grads, results, strict=True):
                _kernel_layout(target, start, stop).copy_(result)
        rotate_(grads[0], cos, -sin)
        rotate_(grads[1], cos, -sin)
        return grad_qkv, None, None, None, None


def _attend_plain(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int], gqa: bool) -> Tensor:
    """One SDPA per document: the plain twin that the fast paths are tested against. Returns [N, H, D]."""
    outs = []
    for start, stop in pairwise(bounds):
        q_, k_, v_ = (_kernel_layout(t, start, stop) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=gqa)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def _attend_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, gqa: bool) -> Tensor:
    """One variable-length flash kernel over all documents (16-bit types only). Returns [N, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
    return out


class Packed:
    """Attention context of N tokens that are whole documents laid end to end."""

    def __init__(self, bounds: Sequence[int], cos: Tensor, sin: Tensor, heads: Heads, *, fast: bool = True):
        """`bounds`: document borders 0 = b₀ < b₁ < … = N on the host; cos and sin as RotaryEmbedding gives them."""
        self.bounds, self.cos, self.sin, self.heads, self.fast = bounds, cos, sin, heads, fast
        self.cu_seqlens: Tensor | None = None
        if cos.is_cuda:  # once per batch, not once per layer
            self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=cos.device)

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """Stacked projections [N, (H + 2·KV)·D] → attention's output [N, H·D]. May overwrite qkv."""
        if self.fast and qkv.device.type == "cpu":
            return _RotaryAttentionCPU.apply(qkv, self.cos, self.sin, self.bounds, self.heads)
        q, k, v = self.heads.split(qkv)
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        gqa = self.heads.query != self.heads.key_value
        if self.fast and self.cu_seqlens is not None and qkv.dtype in (torch.bfloat16, torch.float16):
            longest = max(stop - start for start, stop in pairwise(self.bounds))
            return _attend_cuda(q, k, v, self.cu_seqlens, longest, gqa).flatten(-2)
        return _attend_plain(q, k, v, self.bounds, gqa).flatten(-2)


class Cached:
    """Attention context of B sequences that extend a KV cache (generation)."""

    def __init__(
        self, cache: Cache, batch: int, cos: Tensor, sin: Tensor, heads: Heads, past: int, mask: Tensor | None
    ):
        """`past`: tokens already cached. `mask`: [B, past + L], 1 = real token, 0 = padding; None = no padding."""
        self.cache, self.batch, self.cos, self.sin, self.heads = cache, batch, cos, sin, heads
        self.past, self.length = past, cos.shape[0] // batch
        self.allowed = self._allowed(past + self.length, mask, cos.device)

    def _allowed(self, total: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Which of `total` keys each query may see: [B or 1, 1, L, total], True = may."""
        queries = torch.arange(self.past, self.past + self.length, device=device)[:, None]
        keys = torch.arange(total, device=device)[None, :]
        allowed = (keys <= queries)[None, None]
        if mask is not None:
            # A padding query has no key left; let it see itself, or softmax gives NaN. Nobody reads its output.
            allowed = allowed & mask[:, None, None, :].bool() | (keys == queries)[None, None]
        return allowed

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """Stacked projections [B·L, (H + 2·KV)·D] → attention's output [B·L, H·D]; the cache grows by L."""
        q, k, v = self.heads.split(qkv)
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        q, k, v = (t.unflatten(0, (self.batch, -1)).transpose(1, 2) for t in (q, k, v))
        k, v = self.cache.update(k, v, layer)
        allowed = self.allowed
        if k.shape[-2] > allowed.shape[-1]:  # a static cache is longer than what it holds
            allowed = F.pad(allowed, (0, k.shape[-2] - allowed.shape[-1]))
        gqa = self.heads.query != self.heads.key_value
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1).flatten(-2)
