"""Causal attention within each document, over tokens that lie end to end without padding; and over a KV cache.

A batch without a cache is always seen as N tokens of several documents (`Packed`): a padded batch has its padding
taken out first, a plain [B, L] batch is B documents of length L. No token ever attends to another document, because
no product between two documents is ever formed: there is no mask that could be wrong.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import Cache

from llama_ft.llama.kernels import Spans, attend, choose_kernel
from llama_ft.llama.rope import rotate, rotate_


@dataclass(frozen=True)
class Heads:
    """Shape of the attention: query heads, key/value heads (grouped queries, arXiv 2305.13245), features per head."""

    query: int
    key_value: int
    dim: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Heads:
        """Those of a config; `head_dim` defaults to hidden_size / heads."""
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads, dim)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q [N, H, D], k and v [N, KV, D] of a stacked projection [N, (H + 2·KV)·D]."""
        heads = qkv.unflatten(-1, (-1, self.dim))
        return heads.split((self.query, self.key_value, self.key_value), dim=-2)

    def turned(self, qkv: Tensor) -> Tensor:
        """View [N, H + KV, D] of what RoPE turns: q and k side by side, in one go."""
        return qkv.unflatten(-1, (-1, self.dim))[:, : self.query + self.key_value]


class Context(Protocol):
    """What a block's attention asks: which tokens see which."""

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """Stacked projections [N, (H + 2·KV)·D] → attention's output [N, H·D]. May overwrite qkv."""
        ...


WIDE_UP_TO = 256
"""Documents of so many keys have the CPU kernel's backward in float32 also where the model is held in bfloat16.

Its bfloat16 backward is slow on short ones, whatever the products would allow: 0.9 ms at 64 tokens and 1.9 at 128
against 0.2 and 0.7, casts included; from 320 on it wins (9 heads of 64 features, two cores; `benchmarks/NOTES.md`).
"""


def _kernel_layout(heads: Tensor, span: slice) -> Tensor:
    """Tokens `span` of [N, H, D] as the kernels' [1, H, L, D]; a view. Of [N, H] as [1, H, L]."""
    return heads[span].transpose(0, 1).unsqueeze(0)


class _RotaryAttentionCPU(torch.autograd.Function):
    """RoPE in place, then one causal flash kernel per document, forward and backward into one buffer each.

    Keeping the rotation inside spares two copies of q and k, and hands the projection's backward one stacked gradient.
    What ends see of their prompt is one more kernel, without a mask, for all ends of a prompt. The two softmaxes over
    parts of the keys are merged by their log-sum-exp (arXiv 1805.02867, 2205.14135): with z = log(exp z₁ + exp z₂) the
    output is exp(z₁ − z)·o₁ + exp(z₂ − z)·o₂. Backward needs no more than merged o and z: a flash kernel finds the
    weights of its keys as exp(q·k − z), which are then those of the softmax over both parts.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, spans: Spans, heads: Heads) -> Tensor:
        # qkv is the projection's fresh output and nobody else's; under no_grad here the rotation may overwrite it.
        q, k, v = heads.split(qkv)
        rotate_(heads.turned(qkv), cos, sin)
        out = torch.empty_like(q)
        logsumexp = torch.empty(q.shape[:2], dtype=torch.float32)
        for document, _ in spans.pairs():
            parts = (_kernel_layout(t, document) for t in (q, k, v))
            result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, True)
            _kernel_layout(out, document).copy_(result)
            _kernel_layout(logsumexp, document).copy_(lse)
        for ends, prompt in spans.ends():
            parts = (_kernel_layout(t, span) for t, span in ((q, ends), (k, prompt), (v, prompt)))
            result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, 0.0, False)
            own, own_lse = _kernel_layout(out, ends), _kernel_layout(logsumexp, ends)
            share = torch.sigmoid(lse - own_lse).unsqueeze(-1)  # of the prompt in the whole softmax
            own.copy_(torch.lerp(own.float(), result.float(), share))
            own_lse.copy_(torch.logaddexp(own_lse, lse))
        ctx.spans, ctx.heads = spans, heads
        ctx.save_for_backward(qkv, cos, sin, out, logsumexp)
        return out.flatten(-2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        qkv, cos, sin, out, logsumexp = ctx.saved_tensors
        heads: Heads = ctx.heads
        grad = grad.unflatten(-1, (-1, heads.dim))
        q, k, v = heads.split(qkv)
        grad_qkv = torch.empty_like(qkv)
        grads = heads.split(grad_qkv)

        def gradients(asks: slice, answers: slice, causal: bool) -> tuple[list[Tensor], list[Tensor]]:
            """Where the gradients of q, k and v go, and what these queries and keys add to them."""
            spans = (asks, asks, answers, answers, asks, asks)
            parts = [_kernel_layout(t, span) for t, span in zip((grad, q, k, v, out, logsumexp), spans, strict=True)]
            if answers.stop - answers.start <= WIDE_UP_TO:
                parts = [part.float() for part in parts]
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, causal)
            return [_kernel_layout(t, span) for t, span in zip(grads, (asks, answers, answers), strict=True)], found

        for document, _ in ctx.spans.pairs():
            for target, result in zip(*gradients(document, document, True), strict=True):
                target.copy_(result)
        for ends, prompt in ctx.spans.ends():
            for target, result in zip(*gradients(ends, prompt, False), strict=True):
                target.add_(result)
        rotate_(heads.turned(grad_qkv), cos, -sin)
        return grad_qkv, None, None, None, None


class Packed:
    """Attention context of N tokens that are whole documents laid end to end, or ends of shared prompts."""

    def __init__(
        self,
        bounds: Sequence[int],
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
        dtype: torch.dtype,
        *,
        kernel: str = "auto",
        shared: Sequence[int] | None = None,
    ):
        """`bounds`: document borders 0 = b₀ < b₁ < … = N on the host; cos and sin as RotaryEmbedding gives them;
        `dtype`: of the projections; `kernel`: a name of kernels.KERNELS; `shared`: see kernels.Spans. UserError when
        that kernel cannot run here."""
        self.spans, self.cos, self.sin, self.heads = Spans(bounds, shared=shared), cos, sin, heads
        self.kernel = choose_kernel(kernel, cos.device, dtype, heads.dim)

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """Stacked projections [N, (H + 2·KV)·D] → attention's output [N, H·D]. May overwrite qkv."""
        if self.kernel == "cpu":
            return _RotaryAttentionCPU.apply(qkv, self.cos, self.sin, self.spans, self.heads)
        q, k, v = self.heads.split(qkv)
        q, k = self._turned(q, self.cos, self.sin), self._turned(k, self.cos, self.sin)
        return attend(self.kernel, q, k, v, self.spans).flatten(-2)

    @staticmethod
    def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE in the tables' type, which is wider than the projections' under autocast; back in the projections'."""
        return rotate(heads, cos, sin).to(heads.dtype)

    def attend_rows(self, q: Tensor, kv: Tensor, rows: Rows) -> Tensor:
        """The same for some queries: q [Q, H·D] of `rows`, kv [N, 2·KV·D] of all tokens → [Q, H·D]."""
        q = self._turned(q.unflatten(-1, (-1, self.heads.dim)), self.cos[rows.asking], self.sin[rows.asking])
        k, v = kv.unflatten(-1, (-1, self.heads.dim)).chunk(2, dim=-2)
        k = self._turned(k, self.cos, self.sin)
        # One layer of many, and its mask is not the CPU kernel's own causal one.
        kernel = "plain" if self.kernel == "cpu" else self.kernel
        return attend(kernel, q, k, v, rows.spans).flatten(-2)


class Rows:
    """The tokens whose last hidden state is wanted: the last layer computes q, o and the MLP for no others.

    Of each document everything from its first wanted token on asks (one run of queries: what kernels understand);
    after attention only the wanted ones go on.
    """

    def __init__(self, wanted: Tensor, bounds: Sequence[int], shared: Sequence[int] | None = None):
        """wanted [M]: rising token indices; `shared`: see kernels.Spans."""
        self.wanted = wanted
        host = wanted.tolist()
        asking, queries = [], [0]
        for start, stop in pairwise(bounds):
            next_wanted = bisect_left(host, start)
            first = min(host[next_wanted], stop) if next_wanted < len(host) else stop
            asking.append(torch.arange(first, stop))
            queries.append(queries[-1] + stop - first)
        self.asking = torch.cat(asking).to(wanted.device)
        self.within = torch.searchsorted(self.asking, wanted)
        self.spans = Spans(bounds, queries, shared)


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
