"""The blocks of the decoder: RMSNorm, grouped-query attention, SwiGLU, over tokens laid end to end as [N, hidden]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from llama_ft.llama.attention import Context, Heads, Packed, Rows
from llama_ft.llama.ops import ELEMENTWISE
from llama_ft.llama.projections import Project, project


class LlamaRMSNorm(nn.Module):
    """Scales each row to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.elementwise = "saving"

    def forward(self, x: Tensor) -> Tensor:
        return ELEMENTWISE[self.elementwise][0](x, self.weight, self.eps)


class LlamaAttention(nn.Module):
    """Grouped-query attention: H query heads share KV key/value heads."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        heads = Heads.of(config)
        self.layer = layer
        self.project: Project = project
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads.query * heads.dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, heads.key_value * heads.dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, heads.key_value * heads.dim, bias=bias)
        self.o_proj = nn.Linear(heads.query * heads.dim, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, context: Context, rows: Rows | None = None) -> Tensor:
        """x [N, hidden] → [N, hidden]; with `rows` (packed only), the M wanted ones [M, hidden]."""
        if rows is None:
            qkv = self.project(x, (self.q_proj, self.k_proj, self.v_proj))
            return self.project(context.attend(qkv, self.layer), (self.o_proj,))
        assert isinstance(context, Packed)
        q = self.project(x[rows.asking], (self.q_proj,))
        kv = self.project(x, (self.k_proj, self.v_proj))
        return self.project(context.attend_rows(q, kv, rows)[rows.within], (self.o_proj,))


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.project: Project = project
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.elementwise = "saving"

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.project(x, (self.gate_proj, self.up_proj))
        return self.project(ELEMENTWISE[self.elementwise][1](gate_up), (self.down_proj,))


class LlamaDecoderLayer(GradientCheckpointingLayer):
    """One block; x [N, hidden] → [N, hidden], or the M rows that `rows` wants of the last one."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Context, rows: Rows | None = None) -> Tensor:
        residual = x if rows is None else x[rows.wanted]
        x = add_into(self.self_attn(self.input_layernorm(x), context, rows), residual)
        return add_into(self.mlp(self.post_attention_layernorm(x)), x)


def add_into(product: Tensor, residual: Tensor) -> Tensor:
    """product + residual; in place where the types agree: products are fresh and nothing keeps them.

    Under autocast a product is 16-bit while the residual stream stays float32.
    """
    return product.add_(residual) if product.dtype == residual.dtype else residual + product
