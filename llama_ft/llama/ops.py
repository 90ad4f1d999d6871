"""RMSNorm and SwiGLU: as autograd functions that keep only their inputs, in plain torch, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        # vector_norm reads x once and allocates nothing of its size.
        rms = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        rstd = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        # The normalised row is rounded to x's type before the weight multiplies it, as LLaMA does.
        return (x32 * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, rstd = ctx.saved_tensors
        x32 = x.float()
        grad32 = grad.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad32 * x32).mul_(rstd).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # dx = r·g − x · r³/d · Σ(g·x), with g = grad · weight and r = 1 / rms(x)
            g = grad32 * weight.float()
            inner = torch.linalg.vecdot(g, x32).unsqueeze(-1)
            coefficient = inner.mul_(rstd.pow(3)).div_(-x.shape[-1])
            grad_x = g.mul_(rstd).addcmul_(x32, coefficient).to(x.dtype)
        return grad_x, grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467).

    x [..., d] in any float type; weight [d]; arithmetic in float32; returns x's type.
    """
    return _RMSNorm.apply(x, weight, eps)


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The plain twin of :func:`rms_norm`, left to autograd."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=grad_gate)
        return out


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202) for gate and up side by side: [..., 2·i] → [..., i]."""
    return _SwiGLU.apply(gate_up)


def swiglu_plain(gate_up: Tensor) -> Tensor:
    """The plain twin of :func:`swiglu`, left to autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=True)  # the number of tokens changes from batch to batch


def rms_norm_compiled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """:func:`rms_norm_plain` through torch.compile; needs a C++ compiler on a CPU, Triton on CUDA."""
    return _compiled(rms_norm_plain)(x, weight, eps)


def swiglu_compiled(gate_up: Tensor) -> Tensor:
    """:func:`swiglu_plain` through torch.compile."""
    return _compiled(swiglu_plain)(gate_up)


ELEMENTWISE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "saving": (rms_norm, swiglu),
    "plain": (rms_norm_plain, swiglu_plain),
    "compiled": (rms_norm_compiled, swiglu_compiled),
}
"""(RMSNorm, SwiGLU) by name. Compiled kernels are not the default anywhere until they were measured to pay."""
