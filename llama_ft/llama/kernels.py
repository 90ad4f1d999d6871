"""Attention kernels over documents laid end to end, and which of them a machine has.

All answer the same question: q [Q, H, D] against k and v [N, KV, D], where document i owns keys bounds[i] to
bounds[i + 1] and its queries are the last ones of those tokens (all of them, but for a last layer that only answers at
labelled positions); each query sees the keys of its own document up to itself. No mask over all tokens is ever formed,
so none could be wrong. Ends of a shared prompt become such documents by laying the prompt's keys in front of each one's
own (`attend`): what costs time, projections and MLP, is still done once per prompt.

| name | what | where |
|---|---|---|
| `plain` | torch's SDPA, one call per document | everywhere; the twin that the others are tested against |
| `cpu` | flash kernel per document with RoPE inside (attention.py) | CPU |
| `varlen` | `torch.nn.attention.varlen`, one flash kernel for all documents | CUDA, 16-bit |
| `flash` | `flash_attn_varlen_func` of the flash-attn package | CUDA, 16-bit, where installed |
| `flex` | FlexAttention with a block mask of documents, compiled | CUDA; without gradients also CPU |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import groupby, pairwise
from typing import Any

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor

from llama_ft.errors import UserError, did_you_mean

KERNELS = ("auto", "plain", "cpu", "varlen", "flash", "flex")
HALF = (torch.bfloat16, torch.float16)


class Spans:
    """Which tokens answer and which ask, on the host.

    keys: document borders 0 = b₀ < b₁ < … = N [D + 1]; queries: each document's borders in q [D + 1], not falling;
    shared [D]: the document that each one sees whole before itself, a prompt with several ends, −1: none.
    """

    def __init__(self, keys: Sequence[int], queries: Sequence[int] | None = None, shared: Sequence[int] | None = None):
        self.keys = keys
        self.queries = keys if queries is None else queries
        self.shared = shared
        self._made: dict[str, Any] = {}

    def pairs(self) -> list[tuple[slice, slice]]:
        """(queries, keys) of every document that asks at all."""
        both = zip(pairwise(self.queries), pairwise(self.keys), strict=True)
        return [(slice(*q), slice(*k)) for q, k in both if q[0] < q[1]]

    def ends(self) -> list[tuple[slice, slice]]:
        """(queries, keys of the prompt) of neighbouring documents that see the same prompt, together."""
        found: list[tuple[slice, slice]] = []
        prompts = self.shared or []
        for prompt, run in groupby(range(len(prompts)), key=prompts.__getitem__):
            documents = list(run)
            asks = slice(self.queries[documents[0]], self.queries[documents[-1] + 1])
            if prompt >= 0 and asks.start < asks.stop:
                found.append((asks, slice(self.keys[prompt], self.keys[prompt + 1])))
        return found

    def apart(self) -> tuple[Tensor, Spans]:
        """The same as documents that share nothing: which keys to lay end to end for them [N′], and their borders."""
        parts, keys = [], [0]
        for (start, stop), prompt in zip(pairwise(self.keys), self.shared or [], strict=True):
            before = range(self.keys[prompt], self.keys[prompt + 1]) if prompt >= 0 else range(0)
            parts += [torch.arange(before.start, before.stop), torch.arange(start, stop)]
            keys.append(keys[-1] + len(before) + stop - start)
        return torch.cat(parts), Spans(keys, self.queries)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What a kernel derives from the borders: made for the first layer, kept for the others."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


Kernel = Callable[[Tensor, Tensor, Tensor, Spans], Tensor]


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64, *, training: bool = False
) -> str:
    """The kernel that `name` means for tensors of this kind. UserError when it cannot run there, or not backwards.

    `auto`: `cpu` on a CPU; on CUDA `varlen` where flash attention runs (16-bit types, compute capability 8.0, heads of
    a multiple of 8 up to 256 features), else `plain`.
    """
    if name not in KERNELS:
        raise UserError(f"no attention kernel '{name}'", key="model.attention", hint=did_you_mean(name, KERNELS))
    if name == "auto":
        if device.type == "cpu":
            return "cpu"
        return "plain" if _no_flash(device, dtype, head_dim) else "varlen"
    why = None
    if name == "cpu" and device.type != "cpu":
        why = f"runs on a CPU, the model is on {device.type}"
    elif name in ("varlen", "flash") and (missing := _no_flash(device, dtype, head_dim)):
        why = f"needs {missing}"
    elif name == "flex" and training and device.type == "cpu":
        why = "has no gradients on a CPU"
    elif name == "flash" and find_spec("flash_attn") is None:
        why = "needs the package flash-attn, which is not installed"
    if why:
        raise UserError(f"attention: {name} {why}", key="model.attention", hint="write attention: auto")
    return name


def _no_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What flash attention on CUDA lacks here, or None. An absent card is taken for one that is new enough."""
    if device.type != "cuda" or dtype not in HALF:
        return f"CUDA and a 16-bit type, the model is {str(dtype).removeprefix('torch.')} on {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return f"an Ampere GPU or a later one, this is {torch.cuda.get_device_name(device)}"
    if head_dim % 8 or head_dim > 256:
        return f"heads of a multiple of 8 up to 256 features, these have {head_dim}"
    return None


def plain(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """One SDPA per document; differentiable by autograd alone. Returns [Q, H, D]."""
    gqa = q.shape[1] != k.shape[1]
    outs = [q.new_empty(0, *q.shape[1:])]
    for ask, answer in spans.pairs():
        q_, k_, v_ = (t.transpose(0, 1).unsqueeze(0) for t in (q[ask], k[answer], v[answer]))
        mask = None
        if q_.shape[2] != k_.shape[2]:  # SDPA's own causal mask starts at the first key, ours ends at the last
            rows = torch.arange(k_.shape[2] - q_.shape[2], k_.shape[2], device=q.device)
            mask = torch.arange(k_.shape[2], device=q.device) <= rows[:, None]
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs)


def varlen(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """torch's variable-length flash kernel."""
    from torch.nn.attention.varlen import varlen_attn

    (cu_q, longest_q), (cu_k, longest_k) = spans.once("bounds", lambda: _device_bounds(spans, q.device))
    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, window_size=(-1, 0), enable_gqa=gqa)
    assert isinstance(out, Tensor)  # a tuple only when auxiliary outputs are asked for
    return out


def flash(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """The flash-attn package's kernel (arXiv 2307.08691); causal from the last key backwards."""
    from flash_attn import flash_attn_varlen_func

    (cu_q, longest_q), (cu_k, longest_k) = spans.once("bounds", lambda: _device_bounds(spans, q.device))
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest_q, longest_k, causal=True)


def flex(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """FlexAttention (arXiv 2412.05496). Lengths are rounded up to buckets, so that it compiles a few times only."""
    n_k = bucket(len(k))
    n_q = n_k  # also where few ask: every other pair of sizes would be one more compilation
    mask = spans.once("mask", lambda: _block_mask(spans, n_q, n_k, q.device))
    padded = [F.pad(t, (0, 0, 0, 0, 0, n - len(t))) for t, n in ((q, n_q), (k, n_k), (v, n_k))]
    q_, k_, v_ = (t.transpose(0, 1).unsqueeze(0) for t in padded)
    out = _flex_function(q.is_cuda)(q_, k_, v_, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)[: len(q)]


FUNCTIONS: dict[str, Kernel] = {"plain": plain, "varlen": varlen, "flash": flash, "flex": flex}


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """One of FUNCTIONS, whether prompts are shared or not: q [Q, H, D], k and v [N, KV, D] → [Q, H, D]."""
    if spans.shared is None:
        return FUNCTIONS[kernel](q, k, v, spans)

    def apart() -> tuple[Tensor, Spans]:
        index, whole = spans.apart()
        return index.to(k.device), whole

    index, whole = spans.once("apart", apart)
    return FUNCTIONS[kernel](q, k.index_select(0, index), v.index_select(0, index), whole)


def bucket(length: int) -> int:
    """`length` rounded up to a multiple of 128 and of an eighth of the power of two below it: at most 1/8 more."""
    step = max(128, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


@cache
def _flex_function(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled it holds all scores: right for a test on a CPU, useless for training. One compilation per bucket, and
    # eight buckets per octave: dynamo's own limit of eight would send the rest back to the uncompiled one.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention  # type: ignore[return-value]


def _block_mask(spans: Spans, n_q: int, n_k: int, device: torch.device) -> Any:
    """Which blocks of 128 × 128 hold a pair of the same document. Padding is document −1 as a query, −2 as a key."""
    from torch.nn.attention.flex_attention import create_block_mask

    document_q, position_q = _coordinates(spans.queries, n_q, -1, device, whole=spans.keys)
    document_k, position_k = _coordinates(spans.keys, n_k, -2, device, whole=spans.keys)

    def allowed(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document_q[i] == document_k[j]) & (position_k[j] <= position_q[i])

    return create_block_mask(allowed, None, None, n_q, n_k, device=str(device))


def _coordinates(
    bounds: Sequence[int], length: int, padding: int, device: torch.device, *, whole: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(document, position in it) of `length` tokens: the last ones of each document, whose borders are `whole`."""
    sizes = [b - a for a, b in pairwise(bounds)]
    rest = length - sum(sizes)
    documents = [torch.full((size,), i) for i, size in enumerate(sizes)] + [torch.full((rest,), padding)]
    ends = [b - a for a, b in pairwise(whole)]
    positions = [torch.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    positions.append(torch.zeros(rest, dtype=torch.long))
    return torch.cat(documents).to(device), torch.cat(positions).to(device)


def _device_bounds(spans: Spans, device: torch.device) -> list[tuple[Tensor, int]]:
    found = []
    for bounds in (spans.queries, spans.keys):
        longest = max(b - a for a, b in pairwise(bounds))
        found.append((torch.tensor(bounds, dtype=torch.int32, device=device), longest))
    return found
