"""Attention kernels against plain SDPA on whole documents, and the choice between them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from llama_ft.errors import UserError
from llama_ft.llama import attention
from llama_ft.llama.attention import Heads, Packed, Rows
from llama_ft.llama.kernels import FUNCTIONS, Spans, bucket, choose_kernel

BOUNDS = [0, 1, 30, 32, 161, 300]
HEADS = [(4, 4), (6, 2), (3, 1)]


def tensors(heads: int, kv: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(300, n, 16, generator=generator) for n in (heads, kv, kv)]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Softmax written out, one document after the other."""
    out = torch.empty_like(q)
    share = q.shape[1] // k.shape[1]
    for start, stop in pairwise(BOUNDS):
        future = torch.ones(stop - start, stop - start).triu(1).bool()
        for head in range(q.shape[1]):
            scores = q[start:stop, head] @ k[start:stop, head // share].T / 4.0
            out[start:stop, head] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v[start:stop, head // share]
    return out


@pytest.mark.parametrize(("heads", "kv"), HEADS)
@pytest.mark.parametrize("kernel", ["plain", "flex"])
def test_kernels_on_whole_documents(kernel, heads, kv):
    q, k, v = tensors(heads, kv)
    with torch.no_grad():
        assert (FUNCTIONS[kernel](q, k, v, Spans(BOUNDS)) - expected(q, k, v)).abs().max() <= 1e-5


@pytest.mark.parametrize("kernel", ["plain", "flex"])
@pytest.mark.parametrize("wanted", [[0], [299], [5, 9, 200], [29, 30, 31, 160, 161], list(range(300))])
def test_kernels_where_only_some_tokens_ask(kernel, wanted):
    q, k, v = tensors(6, 2)
    rows = Rows(torch.tensor(wanted), BOUNDS)
    with torch.no_grad():
        out = FUNCTIONS[kernel](q[rows.asking], k, v, rows.spans)[rows.within]
    assert (out - expected(q, k, v)[wanted]).abs().max() <= 1e-5


def test_short_documents_in_bfloat16_have_their_gradient_in_float32(monkeypatch):
    """On a CPU: no further from the float32 gradient than the kernel's own bfloat16 one, for the whole projection."""
    heads, bounds = Heads(6, 2, 16), [0, 1, 30, 32, 161, 800]
    assert bounds[4] - bounds[3] <= attention.WIDE_UP_TO < bounds[5] - bounds[4]
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(800, 10 * 16, generator=generator).bfloat16()
    grad = torch.randn(800, 6 * 16, generator=generator).bfloat16()
    angles = torch.rand(800, 1, 8, generator=generator)

    def gradient(wide: int, dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr(attention, "WIDE_UP_TO", wide)
        source = qkv.to(dtype, copy=True).requires_grad_()
        context = Packed(bounds, angles.cos(), angles.sin(), heads, dtype)
        context.attend(source * 1.0, 0).backward(grad.to(dtype))
        assert source.grad is not None and source.grad.dtype == dtype
        return source.grad.float()

    right = gradient(256, torch.float32)
    apart = [(gradient(wide, torch.bfloat16) - right).norm() / right.norm() for wide in (256, 0)]
    assert apart[0] <= 1.02 * apart[1] and apart[1] < 0.02
    short = [(gradient(wide, torch.bfloat16) - right)[:161].norm() for wide in (256, 0)]
    assert short[0] < short[1]


def test_rows_ask_from_the_first_wanted_token_of_a_document_on():
    rows = Rows(torch.tensor([5, 9, 200]), [0, 4, 12, 190, 203])
    assert rows.asking.tolist() == [*range(5, 12), 200, 201, 202]
    assert rows.within.tolist() == [0, 4, 7]
    assert rows.spans.queries == [0, 0, 7, 7, 10]


def test_gradients_of_the_plain_kernel_for_some_queries():
    q, k, v = (t.requires_grad_() for t in tensors(6, 2))
    rows = Rows(torch.tensor([5, 9, 200]), BOUNDS)
    FUNCTIONS["plain"](q[rows.asking], k, v, rows.spans)[rows.within].square().sum().backward()
    found = [t.grad.clone() for t in (q, k, v)]
    for tensor in (q, k, v):
        tensor.grad = None
    expected(q, k, v)[[5, 9, 200]].square().sum().backward()
    assert all((a - t.grad).abs().max() <= 1e-5 for a, t in zip(found, (q, k, v), strict=True))


def test_buckets_waste_little_and_are_few():
    lengths = range(1, 20_000)
    assert all(n <= bucket(n) < max(n * 1.125 + 1, n + 128) for n in lengths)
    assert len({bucket(n) for n in lengths}) < 70
    assert all(bucket(n) % 128 == 0 for n in lengths)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "found"),
    [
        ("auto", "cpu", torch.bfloat16, "cpu"),
        ("auto", "cuda", torch.bfloat16, "varlen"),
        ("auto", "cuda", torch.float32, "plain"),
        ("plain", "cuda", torch.float32, "plain"),
        ("flex", "cpu", torch.float32, "flex"),
    ],
)
def test_choice(name, device, dtype, found):
    assert choose_kernel(name, torch.device(device), dtype) == found


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("varlen", "cpu", "varlen needs CUDA and a 16-bit type, the model is float32 on cpu"),
        ("flash", "cpu", "flash needs CUDA"),
        ("cpu", "cuda", "runs on a CPU, the model is on cuda"),
        ("flaah", "cpu", "no attention kernel 'flaah'.*did you mean 'flash'"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(name, device, says):
    with pytest.raises(UserError, match=says):
        choose_kernel(name, torch.device(device), torch.float32)


@pytest.mark.parametrize(("head_dim", "found"), [(64, "varlen"), (128, "varlen"), (100, "plain"), (320, "plain")])
def test_heads_that_flash_attention_cannot_take(head_dim, found):
    assert choose_kernel("auto", torch.device("cuda"), torch.bfloat16, head_dim) == found
    if found == "plain":
        with pytest.raises(UserError, match=f"these have {head_dim}"):
            choose_kernel("varlen", torch.device("cuda"), torch.bfloat16, head_dim)


def test_flex_cannot_train_on_a_cpu():
    with pytest.raises(UserError, match="flex has no gradients on a CPU"):
        choose_kernel("flex", torch.device("cpu"), torch.float32, training=True)


def test_sdpa_without_document_borders_would_differ():
    """The test above can fail: one causal SDPA over all tokens gives something else."""
    q, k, v = tensors(4, 4)
    leaky = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), is_causal=True)
    assert (leaky[0].transpose(0, 1) - expected(q, k, v)).abs().max() > 0.1
