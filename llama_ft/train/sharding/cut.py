"""A model for an engine that cuts up weights, made without a copy of the whole in every process.

FSDP2: the main process has the weights and accelerate sends each to all, who keep their part; the others hold tensors
that nobody has written to, and so no memory. ZeRO-3: every process makes the model inside DeepSpeed's `zero.Init`,
which cuts a weight as soon as it is made; the main process reads one weight at a time and DeepSpeed spreads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.initialization import no_init_weights

from llama_ft.llama.checkpoints.hf import open_hf
from llama_ft.llama.init import initial_weights, meta_model, weight_shapes
from llama_ft.llama.load import DTYPES
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.train.base import Base


def grown_config(base: Base) -> LlamaConfig:
    """The base's config with rows for added tokens."""
    config = LlamaConfig.from_dict({**base.config.to_dict(), "vocab_size": base.vocabulary})
    config.name_or_path = str(base.folder)
    return config


def hollow_model(config: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """A model on the CPU whose weights have a size and no memory: the system gives pages to what is written to."""
    model: Any = meta_model(config)
    model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    return model


def base_weights(base: Base, main: bool) -> Iterator[tuple[str, Tensor | None]]:
    """(name, weight) of the base in the order of the model, one at a time; None for weights in all processes but main.

    As a whole model would be loaded: rounded to `model.dtype` where they are not trained themselves, new rows the mean
    of the others (:func:`llama_ft.llama.init.resize_embeddings`), random ones where the run starts from none.
    """
    if not main:
        yield from ((name, None) for name in weight_shapes(base.config))
        return
    if base.new and base.full:
        yield from initial_weights(base.config, base.recipe.training.seed)
        return
    stored = open_hf(base.folder)
    rounded = torch.float32 if base.full else DTYPES[base.recipe.model.dtype]
    for name in weight_shapes(base.config):
        weight = stored.read(name).to(rounded)
        missing = base.vocabulary - base.config.vocab_size if name.startswith(("model.embed", "lm_head")) else 0
        if missing > 0:
            mean = weight.float().mean(dim=0).to(weight.dtype)
            weight = torch.cat([weight, mean.expand(missing, -1)])
        yield name, weight


def cut_model(
    config: LlamaConfig, dtype: torch.dtype, weights: Iterator[tuple[str, Tensor | None]]
) -> LlamaForCausalLM:
    """A model under ZeRO-3, held in `dtype`, with the main process's `weights`. Called by every process."""
    import deepspeed

    zero: dict[str, Any] = {"stage": 3}
    offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if offload != "none":
        zero["offload_param"] = {"device": offload}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    # Without its own linear layer: ours and PEFT's are what the fast paths and the equivalence tests know.
    with (
        no_init_weights(),
        deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype, mem_efficient_linear=False),
    ):
        model = LlamaForCausalLM(config)
    model.tie_weights()  # which transformers leaves out where no weights are initialised
    rotary = model.model.rotary_emb  # DeepSpeed has rounded what was made inside
    rotary.inv_freq = rotary.frequencies(rotary.inv_freq.device)[0]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            with deepspeed.zero.GatheredParameters([parameters[name]], modifier_rank=0):
                if weight is not None:
                    parameters[name].copy_(weight)
    return model
