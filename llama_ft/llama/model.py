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
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llama_ft.llama.attention import Cached, Context, Heads, Packed, Rows
from llama_ft.llama.fast import FEW_ROWS, Fast
from llama_ft.llama.head import IGNORE, LossHead, LossOutput, TokenOutput, shift_labels, sums_of_documents
from llama_ft.llama.layers import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, add_into
from llama_ft.llama.noise import add_noise
from llama_ft.llama.packing import Packing
from llama_ft.llama.projections import Project, multiplied_in, project_each
from llama_ft.llama.rope import RotaryEmbedding

__all__ = [
    "LlamaAttention",
    "LlamaDecoderLayer",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LlamaModel",
    "LlamaPreTrainedModel",
    "LlamaRMSNorm",
    "TokenOutput",
    "add_into",
]


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

    def run(self, x: Tensor, context: Context, rows: Rows | None = None) -> Tensor:
        """Blocks and last norm over x [N, hidden]; with `rows`, only the wanted [M, hidden]."""
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            if isinstance(layer, FSDPModule):
                assert isinstance(layer, LlamaDecoderLayer)
                # A stack would be a copy of weights that FSDP2 frees after the layer, kept alive until backward.
                layer.self_attn.project = layer.mlp.project = project_each
            x = layer(x, context, rows if number == last else None)
        return self.norm(x)

    def forward_packed(self, x: Tensor, packing: Packing, wanted: Tensor | None = None) -> Tensor:
        """x [N, hidden] that lies as `packing` says → last hidden state [N, hidden].

        wanted [M], rising token indices: only their hidden state [M, hidden] is asked for.
        """
        bounds, shared = packing.bounds, packing.shared
        if shared is not None and self.rotary_emb.rope_type == "dynamic":
            raise ValueError("rope_type dynamic turns a prompt by the length of each document: lay its copies out")
        cos, sin = self.rotary_emb(packing.positions, x.dtype, bounds)
        kernel = self.fast.attention
        context = Packed(bounds, cos, sin, self.heads, multiplied_in(x), kernel=kernel, shared=shared)
        if wanted is None:
            return self.run(x, context)
        # Where nearly all is wanted, or nothing, leaving rows out saves nothing.
        if self.fast.labelled_rows and 0 < len(wanted) < FEW_ROWS * len(x):
            return self.run(x, context, Rows(wanted, bounds, shared))
        return self.run(x, context)[wanted]

    def hidden_of(
        self,
        input_ids: Tensor,
        rows: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        shared: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Last hidden states [M, hidden] of the tokens `rows` [M] of input_ids [B, L], counted row by row.

        The last layer is computed for these tokens alone. They may repeat and need not rise. The layout is given as to
        :meth:`forward`. ValueError for a row that is padding.
        """
        embeds = self.embed_tokens(input_ids)
        batch, length = embeds.shape[:2]
        packing = Packing.of(batch, length, attention_mask, position_ids, cu_seqlens, embeds.device, shared)
        wanted, again = packing.places(rows).unique(return_inverse=True)
        hidden = self.forward_packed(packing.take(embeds), packing, wanted)
        return hidden.index_select(0, again)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        shared: Sequence[int] | Tensor | None = None,
        context: Context | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, L, hidden] of input_ids [B, L] (or inputs_embeds [B, L, hidden]).

        Without a cache, documents are told apart by `cu_seqlens` ([documents + 1], with B = 1 and no padding), else by
        the zeros of position_ids [B, L]; rows of a batch are documents of their own; attention_mask [B, L] marks
        padding with 0, which is taken out before and returned as zeros. `shared` [documents] names for each of
        cu_seqlens' segments the one that it sees before itself, a prompt with several ends; −1 for none. A cache is
        used only when asked for. With a `context` of the caller's own all that is its business.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [B, L], got {list(attention_mask.shape)}")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if context is not None:
            hidden = self.run(embeds.flatten(0, 1), context)
            return BaseModelOutputWithPast(last_hidden_state=hidden.unflatten(0, embeds.shape[:2]))
        if past_key_values is not None or use_cache:
            cache = past_key_values if past_key_values is not None else DynamicCache(config=self.config)
            hidden = self._forward_cached(embeds, attention_mask, position_ids, cache)
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
        batch, length = embeds.shape[:2]
        packing = Packing.of(batch, length, attention_mask, position_ids, cu_seqlens, embeds.device, shared)
        hidden = self.forward_packed(packing.take(embeds), packing)
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
        *,
        shared: Sequence[int] | Tensor | None = None,
        rows: Tensor | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        context: Context | None = None,
        by_document: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast | TokenOutput:
        """Logits [B, L or logits_to_keep, V]; or, with labels [B, L] (−100 = no loss), the loss and no logits; or, with
        rows [M] and targets [M], what the tokens `rows` give the tokens `targets`, and no logits.

        The loss is the sum over labelled tokens divided by `num_items_in_batch` (all labelled tokens of a global
        batch, so that accumulation does not change it), or by their own number when that is not given.

        `log_probs` [M] of the TokenOutput are log softmax(logits / temperature), in nats; for rows, see
        :meth:`LlamaModel.hidden_of`, for `shared` :meth:`LlamaModel.forward`. With a frozen head its gradient costs no
        second pass over the vocabulary.
        """
        if targets is not None:
            if input_ids is None or rows is None:
                raise ValueError("targets need input_ids, and rows that say where they are predicted")
            if labels is not None or past_key_values is not None:
                raise ValueError("targets go with neither labels nor a cache")
            hidden = self.model.hidden_of(
                input_ids,
                rows,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cu_seqlens=cu_seqlens,
                shared=shared,
            )
            fast = self.model.fast.head
            return TokenOutput(self.lm_head(hidden, targets, fast=fast, each=True, temperature=temperature))
        if labels is not None:
            if past_key_values is not None or shared is not None:
                raise ValueError("a loss is computed without a cache and, with labels, without shared prompts")
            sums: list[Tensor] | None = [] if by_document else None
            loss = self.loss(
                input_ids, labels, attention_mask, position_ids, inputs_embeds, cu_seqlens, num_items_in_batch, sums
            )
            return LossOutput(loss=loss, document_losses=sums[0]) if sums else CausalLMOutputWithPast(loss=loss)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cu_seqlens,
            shared,
            context,
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
        sums: list[Tensor] | None = None,
    ) -> Tensor:
        """Cross-entropy in nats per labelled token, a float32 scalar; 0 (and its gradient) when nothing is labelled.

        `sums` receives one tensor, the nats of each document: see :class:`LossOutput`.
        """
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = labels.shape
        packing = Packing.of(batch, length, attention_mask, position_ids, cu_seqlens, embeds.device)
        tokens = packing.take(embeds)
        if self.training and self.neftune_alpha:
            tokens = add_noise(tokens, packing.bounds, self.neftune_alpha)
        targets = shift_labels(packing.take(labels), packing.bounds)
        labelled = (targets != IGNORE).nonzero().squeeze(-1)
        hidden = self.model.forward_packed(tokens, packing, labelled)
        kept: list[Tensor] | None = None if sums is None else []
        total = self.lm_head(hidden, targets[labelled], fast=self.model.fast.head, kept=kept)
        if sums is not None and kept is not None:
            sums.append(sums_of_documents(kept[0], labelled, packing.bounds))
        return total / (max(len(labelled), 1) if num_items_in_batch is None else num_items_in_batch)
