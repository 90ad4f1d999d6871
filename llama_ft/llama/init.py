"""Weights that no training has touched: a whole model's first ones, and rows for tokens that were added later.

What the papers say: nothing. LLaMA (2302.13971), Llama 2 (2307.09288) and Llama 3 (2407.21783) give no initialisation,
and Meta's published code only loads weights. What is done here is convention: every matrix is normal with the config's
`initializer_range` as standard deviation (0.02 in the published LLaMA configs and in GPT-2's code), except the two that
write into the residual stream, o_proj and down_proj, which are divided by √(2·layers), so that the stream's variance
does not grow with depth (GPT-2's report, section 2.3: "a factor of 1/√N where N is the number of residual layers";
llama2.c and torchtitan initialise LLaMAs so too). Norms are one, biases zero. A fresh model is nearly indifferent: its
loss is close to ln(vocabulary) + hidden · σ² / 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig

from llama_ft.llama.model import LlamaForCausalLM

_RESIDUAL = ("o_proj.weight", "down_proj.weight")
_CHUNK = 2**22  # values drawn at once: 32 MB in float64


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every stored tensor of a LLaMA by Hugging Face's name, in the model's order; a tied head is the embedding."""
    return {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}


def meta_model(config: LlamaConfig) -> LlamaForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def initial_weights(config: LlamaConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor on the CPU) for each of :func:`weight_shapes`, one at a time, in its order.

    One generator, seeded once, draws in float64 in this order: values depend on seed, config and torch alone, and not
    on the type the weights are kept in, on the number of processes or on the width of the CPU's float32 kernels.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in weight_shapes(config).items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif name.endswith(".bias"):
            yield name, torch.zeros(shape)
        else:
            std = config.initializer_range
            if name.endswith(_RESIDUAL):
                std /= math.sqrt(2 * config.num_hidden_layers)
            yield name, _normal(shape, std, generator)


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    tensor = torch.empty(shape)
    for part in tensor.view(-1).split(_CHUNK):
        part.copy_(torch.empty(part.shape, dtype=torch.float64).normal_(0.0, std, generator=generator))
    return tensor


@torch.no_grad()
def resize_embeddings(model: LlamaForCausalLM, size: int) -> None:
    """Grows the vocabulary to `size`; each new row, of the embedding and of the head, is the mean of the others.

    So a new token starts as no token in particular (Alpaca's rule, stanford_alpaca train.py). `config.vocab_size`
    follows. Raises ValueError when `size` is smaller than the vocabulary: rows are not thrown away.
    """
    old = model.config.vocab_size
    if size < old:
        raise ValueError(f"the vocabulary has {old} tokens and cannot shrink to {size}")
    if size == old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    weights = [model.model.embed_tokens.weight]
    if not model.config.tie_word_embeddings:
        weights.append(model.lm_head.weight)
    for weight in weights:
        weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
