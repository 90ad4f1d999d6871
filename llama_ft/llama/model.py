"""LLaMA: a decoder of pre-normalised blocks, h ← h + Attention(RMSNorm(h)), h ← h + SwiGLU(RMSNorm(h)).

Papers: LLaMA 2302.13971, Llama 2 2307.09288, Llama 3 2407.21783. A `PreTrainedModel` with Hugging Face's parameter
names and config, so that PEFT, TRL, accelerate, generate and every server see an ordinary LLaMA, and a forward of our
own: tokens of all documents lie end to end as [N, hidden], without padding, and labels never cost a logit too many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llama_ft.llama.attention import Cached, Heads, Packed, Rows
from llama_ft.llama.fast import FEW_ROWS, Fast
from llama_ft.llama.head import IGNORE, LossHead, shift_labels
from llama_ft.llama.noise import add_noise
from llama_ft.llama.ops import ELEMENTWISE
from llama_ft.llama.packing import Packing
from llama_ft.llama.projections import Project, multiplied_in, project, project_each
from llama_ft.llama.rope import RotaryEmbedding


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

    def forward(self, x: Tensor, context: Packed | Cached, rows: Rows | None = None) -> Tensor:
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

    def forward(self, x: Tensor, context: Packed | Cached, rows: Rows | None = None) -> Tensor:
        residual = x if rows is None else x[rows.wanted]
        x = add_into(self.self_attn(self.input_layernorm(x), context, rows), residual)
        return add_into(self.mlp(self.post_attention_layernorm(x)), x)


def add_into(product: Tensor, residual: Tensor) -> Tensor:
    """product + residual; in place where the types agree: products are fresh and nothing keeps them.

    Under autocast a product is 16-bit while the residual stream stays float32.
    """
    return product.add_(residual) if product.dtype == residual.dtype else residual + product


class LlamaPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config: LlamaConfig
    config_class = LlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer"]  # noqa: RUF012 (transformers' own convention)
    _supports_sdpa = True

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        for model in self.modules():
            if isinstance(model, LlamaModel):
                for number, layer in enumerate(model.layers):
                    assert isinstance(layer, LlamaDecoderLayer)
                    if number % model.checkpoint_every:
                        layer.gradient_checkpointing = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LlamaRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None:
                init.zeros_(bias)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies(module.inv_freq.device)[0])


class LlamaModel(LlamaPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.heads = Heads.of(config)
        self.fast = Fast()
        self.checkpoint_every = 1
        """With gradient checkpointing: recompute every layer (1), or every second one (2) …"""
        self.gradient_checkpointing = False
        self.post_init()

    def set_project(self, project: Project) -> None:
        """Fills the seam: every projection goes through `project` from now on."""
        for layer in self.layers:
            assert isinstance(layer, LlamaDecoderLayer)
            layer.self_attn.project = layer.mlp.project = project

    def set_fast(self, fast: Fast) -> None:
        """Chooses fast paths or their plain twins, here and in every layer."""
        self.fast = fast
        for module in self.modules():
            if isinstance(module, (LlamaRMSNorm, LlamaMLP)):
                module.elementwise = fast.elementwise

    def run(self, x: Tensor, context: Packed | Cached, rows: Rows | None = None) -> Tensor:
        """Blocks and last norm over x [N, hidden]; with `rows`, only the wanted [M, hidden]."""
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            if isinstance(layer, FSDPModule):
                assert isinstance(layer, LlamaDecoderLayer)
                # A stack would be a copy of weights that FSDP2 frees after the layer, kept alive until backward.
                layer.self_attn.project = layer.mlp.project = project_each
            x = layer(x, context, rows if number == last else None)
        return self.norm(x)

    def forward_packed(
        self, x: Tensor, positions: Tensor, bounds: Sequence[int], wanted: Tensor | None = None
    ) -> Tensor:
        """x [N, hidden] of documents that end at bounds[1:], positions [N] → last hidden state [N, hidden].

        wanted [M], rising token indices: only their hidden state [M, hidden] is asked for.
        """
        cos, sin = self.rotary_emb(positions, x.dtype, bounds)
        context = Packed(bounds, cos, sin, self.heads, multiplied_in(x), kernel=self.fast.attention)
        if wanted is None:
            return self.run(x, context)
        # Where nearly all is wanted, or nothing, leaving rows out saves nothing.
        if self.fast.labelled_rows and 0 < len(wanted) < FEW_ROWS * len(x):
            return self.run(x, context, Rows(wanted, bounds))
        return self.run(x, context)[wanted]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, L, hidden] of input_ids [B, L] (or inputs_embeds [B, L, hidden]).

        Without a cache, documents are told apart by `cu_seqlens` ([documents + 1], with B = 1 and no padding), else by
        the zeros of position_ids [B, L]; rows of a batch are documents of their own; attention_mask [B, L] marks
        padding with 0, which is taken out before and returned as zeros. A cache is used only when asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [B, L], got {list(attention_mask.shape)}")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is not None or use_cache:
            cache = past_key_values if past_key_values is not None else DynamicCache(config=self.config)
            hidden = self._forward_cached(embeds, attention_mask, position_ids, cache)
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
        batch, length = embeds.shape[:2]
        packing = Packing.of(batch, length, attention_mask, position_ids, cu_seqlens, embeds.device)
        hidden = self.forward_packed(packing.take(embeds), packing.positions, packing.bounds)
        return BaseModelOutputWithPast(last_hidden_state=packing.put_back(hidden))

    def _forward_cached(
        self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache
    ) -> Tensor:
        batch, length = embeds.shape[:2]
        past = int(cache.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=embeds.device).expand(batch, -1)
        cos, sin = self.rotary_emb(position_ids.expand(batch, -1).flatten(), embeds.dtype)
        mask = attention_mask
        if mask is not None:
            mask = mask[:, : past + length]
            mask = None if bool(mask.all()) else mask
        context = Cached(cache, batch, cos, sin, self.heads, past, mask)
        return self.run(embeds.flatten(0, 1), context).unflatten(0, (batch, length))


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """LLaMA with its language-model head, tied to the embedding where the config says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' convention)

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = LossHead(config.hidden_size, config.vocab_size, bias=False)
        self.neftune_alpha: float | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, L or logits_to_keep, V]; or, with labels [B, L] (−100 = no loss), the loss and no logits.

        The loss is the sum over labelled tokens divided by `num_items_in_batch` (all labelled tokens of a global
        batch, so that accumulation does not change it), or by their own number when that is not given.
        """
        if labels is not None:
            if past_key_values is not None:
                raise ValueError("a loss is computed without a cache")
            return CausalLMOutputWithPast(
                loss=self.loss(
                    input_ids, labels, attention_mask, position_ids, inputs_embeds, cu_seqlens, num_items_in_batch
                )
            )
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cu_seqlens
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Keeps the head one that can answer with the loss, whatever resized it."""
        if type(new_embeddings) is nn.Linear:
            new_embeddings.__class__ = LossHead
        super().set_output_embeddings(new_embeddings)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        """Keeps generate from building its own [B, 1, L, cache] mask: a static cache gets the same one from us."""
        return attention_mask

    def loss(
        self,
        input_ids: Tensor | None,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Cross-entropy in nats per labelled token, a float32 scalar; 0 (and its gradient) when nothing is labelled."""
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = labels.shape
        packing = Packing.of(batch, length, attention_mask, position_ids, cu_seqlens, embeds.device)
        tokens = packing.take(embeds)
        if self.training and self.neftune_alpha:
            tokens = add_noise(tokens, packing.bounds, self.neftune_alpha)
        targets = shift_labels(packing.take(labels), packing.bounds)
        labelled = (targets != IGNORE).nonzero().squeeze(-1)
        hidden = self.model.forward_packed(tokens, packing.positions, packing.bounds, labelled)
        total = self.lm_head(hidden, targets[labelled], fast=self.model.fast.head)
        return total / (max(len(labelled), 1) if num_items_in_batch is None else num_items_in_batch)
