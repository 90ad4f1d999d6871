"""The one seam for matrix products: every projection of every layer goes through `project(x, linears)`.

`adapters` fills it with a fused LoRA product; the default below is the plain one. Linears that read the same input
(q/k/v, gate/up) are handed over together and answered side by side, so that one GEMM can serve them all while the
parameters keep their own names for PEFT and for exports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Project = Callable[[Tensor, Sequence[nn.Module]], Tensor]


def multiplied_in(x: Tensor) -> torch.dtype:
    """The type that matrix products of x come in: its own, or autocast's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def is_bare(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the weight may be read directly: a plain nn.Linear that no engine (ZeRO-3, offload) must fill first."""
    return type(linear) is nn.Linear and not linear._forward_pre_hooks and not linear._forward_hooks


def project(x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """x [N, in] through each of `linears`, results side by side: [N, Σ out]."""
    if len(linears) == 1:
        return linears[0](x)
    bare: list[Any] = [linear.weight for linear in linears if is_bare(linear) and linear.bias is None]
    if len(bare) == len(linears):
        return F.linear(x, torch.cat(bare))
    return project_each(x, linears)


def project_each(x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """The same by calling each module: right for any module, one product each."""
    return torch.cat([linear(x) for linear in linears], dim=-1)
