"""The model of a run in memory, ready to train: base and adapter, in the type it computes in.

An engine that cuts up weights (FSDP2, ZeRO-3) is given them without any process but the main one reading them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import set_seed

from llama_ft.adapters.base import load_base
from llama_ft.adapters.lora import attach_lora
from llama_ft.adapters.quantised import digest
from llama_ft.adapters.sizes import is_frozen
from llama_ft.llama.attention import Heads
from llama_ft.llama.fast import Fast
from llama_ft.llama.init import resize_embeddings
from llama_ft.llama.kernels import choose_kernel
from llama_ft.llama.load import DTYPES, build_random, choose_compute_dtype
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.reward import LlamaForSequenceClassification, as_reward_model
from llama_ft.train.base import Base
from llama_ft.train.engine import Engine
from llama_ft.train.sharding.cut import base_weights, cut_model, grown_config, hollow_model


@dataclass
class Loaded:
    """A model ready to train, the type it is held in, and the fingerprint of a quantised base."""

    model: PreTrainedModel | PeftModel
    compute_dtype: torch.dtype
    base_digest: str | None = None


def load_for_training(
    base: Base, device: torch.device, compute_dtype: str | None, engine: Engine | None = None
) -> Loaded:
    """The base model with its adapter (or with all weights trainable), seeded, in the type it will compute in.

    `compute_dtype` is the locked type of a run that is resumed; None chooses one for this machine. engine: the one that
    will train; where it cuts up weights, what comes back is not whole in every process.
    """
    recipe = base.recipe
    dtype = DTYPES[recipe.model.dtype]
    if compute_dtype is not None:
        compute = DTYPES[compute_dtype]
    else:
        # Full tuning needs float32 masters: an update of 1e-5 is lost in a 16-bit weight.
        compute = torch.float32 if base.full else choose_compute_dtype(dtype, device)
        if device.type == "cpu" and trains_base_weights(base):
            compute = torch.float32  # there is no autocast here that would bring the two types together
        compute = broadcast_object_list([compute])[0]  # near the threshold, ranks could find differently
    # Full tuning on a GPU multiplies in the recipe's type under autocast, whatever its weights are held in.
    multiplied = dtype if device.type == "cuda" else compute
    choose_kernel(recipe.model.attention, device, multiplied, Heads.of(base.config).dim, training=True)
    cut = engine is not None and engine.cuts_weights
    if cut and engine is not None and engine.name == "ZeRO-3":
        model: Any = cut_model(grown_config(base), compute, base_weights(base, PartialState().is_main_process))
    elif cut and _main_alone_reads() and not PartialState().is_main_process:
        model = hollow_model(grown_config(base), compute)
    else:
        model = load_whole(base, compute, device)
    model.config.use_cache = False
    model.model.set_fast(Fast(attention=recipe.model.attention))
    model.model.checkpoint_every = 2 if recipe.training.gradient_checkpointing == "selective" else 1
    if isinstance(model, LlamaForCausalLM):
        model.neftune_alpha = recipe.training.neftune_alpha
    set_seed(recipe.training.seed)
    if base.full:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_frozen(name, recipe.adapter))
        return Loaded(model, compute)
    base_digest = digest(model) if recipe.adapter.method == "qlora" else None
    adapted = attach_lora(model, recipe.adapter, new_tokens=base.grown, stacked=not cut)
    return Loaded(adapted, compute, base_digest)


def load_whole(
    base: Base, compute: torch.dtype, device: torch.device
) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """The base with all of its weights, rows for added tokens included; for objective reward a score for its head."""
    recipe = base.recipe
    if not (base.new and base.full):
        return load_base(base.folder, recipe, compute, device, rows=base.vocabulary)
    model = build_random(base.config, recipe.training.seed)
    if base.grown:
        resize_embeddings(model, base.vocabulary)
    return as_reward_model(model, recipe.training.seed) if recipe.training.objective == "reward" else model


def _main_alone_reads() -> bool:
    """Whether accelerate sends the main process's weights to the others, as the launch config says."""
    return os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"


def trains_base_weights(base: Base) -> bool:
    """Whether weights of the base itself are trained: all of them, or some beside an adapter."""
    return base.full or base.grown or bool(base.recipe.adapter.modules_to_save)
