"""LoRA as one autograd function per input: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ for all projections that read the same x.

PEFT's own forward makes three products, two sums and a scaling per projection, and keeps every intermediate. Here
q/k/v (and gate/up) share one product with the base, one with the stacked A, and their B are added in place; backward
keeps x and x·Aᵀ only. PEFT still owns the parameters: this only computes with them. An NF4 base leaves its 4 bits as
one stacked weight, used and let go, once in forward and once in backward. Where the formula does not hold (DoRA,
dropout in training, several adapters, a trainable base, LLM.int8()), PEFT's forward runs instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from llama_ft.adapters.quantised import dequantise, is_nf4
from llama_ft.llama.projections import is_bare, multiplied_in, project, project_each


class _FusedLora(torch.autograd.Function):
    """Inputs: x [N, in], base, scale, then A₁ [r₁, in], B₁ [out₁, r₁], A₂, B₂ …

    base: the frozen stacked W [out, in], or what makes it each time it is needed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor | Callable[[], Tensor], scale: float, *factors: Tensor) -> Tensor:
        downs, ups = factors[0::2], factors[1::2]
        weight = base if isinstance(base, Tensor) else base()
        stacked = downs[0] if len(downs) == 1 else torch.cat(downs)
        low = F.linear(x, stacked.to(x.dtype))
        y = F.linear(x, weight)
        for out, part, up in zip(*_columns(y, low, ups), ups, strict=True):
            out.addmm_(part, up.to(x.dtype).t(), alpha=scale)
        ctx.scale, ctx.make = scale, None if isinstance(base, Tensor) else base
        ctx.save_for_backward(x, low, weight if ctx.make is None else None, *factors)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, low, weight, *factors = ctx.saved_tensors
        downs, ups = factors[0::2], factors[1::2]
        grad_low = torch.empty_like(low)
        grad_ups = []
        columns = zip(*_columns(grad, low, ups), _columns(grad, grad_low, ups)[1], ups, strict=True)
        for grad_out, part, grad_part, up in columns:
            torch.mm(grad_out, up.to(grad.dtype), out=grad_part)
            # As [r, out] and turned afterwards: BLAS is up to twice as fast with the short side first.
            grad_ups.append((part.t() @ grad_out).to(up.dtype).mul_(ctx.scale).t())
        grad_low.mul_(ctx.scale)
        stacked = downs[0] if len(downs) == 1 else torch.cat(downs)
        grad_stacked = (grad_low.t() @ x).to(stacked.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:  # not below the lowest adapter
            weight = weight if ctx.make is None else ctx.make()
            grad_x = (grad @ weight).addmm_(grad_low, stacked.to(grad.dtype))
        grad_downs = grad_stacked.split([down.shape[0] for down in downs])
        pairs = zip(grad_downs, grad_ups, strict=True)
        return grad_x, None, None, *(gradient for pair in pairs for gradient in pair)


def _columns(wide: Tensor, low: Tensor, ups: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The columns of each projection in the stacked output [N, Σ out] and in the stacked low rank [N, Σ r]."""
    return wide.split([up.shape[0] for up in ups], dim=1), low.split([up.shape[1] for up in ups], dim=1)


def can_fuse(linear: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether the formula above is what this module computes."""
    known = type(linear).forward is LoraLinear.forward or type(linear).__qualname__ == "Linear4bit"
    if not isinstance(linear, LoraLayer) or not known or linear.disable_adapters or linear.merged:
        return False
    if len(linear.active_adapters) != 1 or (name := linear.active_adapters[0]) not in linear.lora_A:
        return False
    base = linear.get_base_layer()
    dropout = linear.lora_dropout[name]
    return (
        (is_bare(base) or is_nf4(base))
        and base.bias is None
        and not base.weight.requires_grad
        and name not in linear.lora_variant  # DoRA and its kin change the formula
        and linear.lora_A[name].bias is None
        and linear.lora_B[name].bias is None
        and (isinstance(dropout, nn.Identity) or not dropout.training)
    )


def fused_project(x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """Fills the model's projection seam: fused where every module allows it, else exactly what PEFT computes.

    With adapters switched off it is the base's part of the fused product, rounded as there: in 16 bits a product of its
    own for each projection would be another model than the one that an adapter with B = 0 is.
    """
    adapted = [linear for linear in linears if isinstance(linear, LoraLayer)]
    if len(adapted) == len(linears) and all(linear.disable_adapters and not linear.merged for linear in adapted):
        base = _base_of(x, [linear.get_base_layer() for linear in adapted])
        if base is not None:
            return F.linear(x, base if isinstance(base, Tensor) else base())
    loras = [linear for linear in linears if can_fuse(linear)]
    if len(loras) < len(linears):
        return (project_each if adapted else project)(x, linears)
    parts: list[tuple[Any, str]] = [(lora, lora.active_adapters[0]) for lora in loras]
    scales = {lora.scaling[name] for lora, name in parts}
    base = _base_of(x, [lora.get_base_layer() for lora, _ in parts]) if len(scales) == 1 else None
    if base is None:
        return project_each(x, linears)
    factors = [matrix[name].weight for lora, name in parts for matrix in (lora.lora_A, lora.lora_B)]
    return _FusedLora.apply(x, base, scales.pop(), *factors)


def _base_of(x: Tensor, bases: Sequence[Any]) -> Tensor | Callable[[], Tensor] | None:
    """The stacked frozen weight that x is multiplied with, or what makes it; None where there is no such product."""
    quantised = [is_nf4(base) for base in bases]
    plain = all(quantised) or all(is_bare(base) for base in bases)
    if not plain or any(base.bias is not None or base.weight.requires_grad for base in bases):
        return None
    held_in = bases[0].weight.quant_state.dtype if all(quantised) else bases[0].weight.dtype
    if not x.dtype == multiplied_in(x) == held_in:  # autocast goes PEFT's way
        return None
    return partial(_out_of_nf4, bases) if all(quantised) else _stacked([base.weight for base in bases])


def _out_of_nf4(bases: Sequence[Any]) -> Tensor:
    """[Σ out, in]: the weights that NF4 layers multiply with, one below the other."""
    weights = [dequantise(base) for base in bases]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """[Σ out, in]: without a copy when the weights already lie one after the other (see `stack_frozen`)."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    storage, expected = first.untyped_storage().data_ptr(), first.data_ptr()
    for weight in weights:
        # Neighbours by chance, each in a storage of its own, are no stack.
        ours = weight.untyped_storage().data_ptr() == storage and weight.data_ptr() == expected
        if not ours or not weight.is_contiguous():
            return torch.cat(list(weights))
        expected += weight.numel() * weight.element_size()
    rows = sum(weight.shape[0] for weight in weights)
    return first.detach().as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())


def stack_frozen(linears: Sequence[nn.Linear]) -> None:
    """Lays frozen weights one after the other in one storage; each stays a parameter of its own, now a view."""
    stacked = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, stacked.split([linear.weight.shape[0] for linear in linears]), strict=True):
        linear.weight.data = part
