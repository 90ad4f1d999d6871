"""The base that a recipe's adapter sits on, in memory: plain or quantised, with rows for tokens that were added."""

from __future__ import annotations

from pathlib import Path

import torch

from llama_ft.adapters.quantised import load_quantised
from llama_ft.llama.init import resize_embeddings
from llama_ft.llama.load import DTYPES, load_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.reward import LlamaForSequenceClassification, as_reward_model
from llama_ft.recipe.schema import Recipe


def load_base(
    folder: Path, recipe: Recipe, compute: torch.dtype, device: torch.device, *, rows: int = 0
) -> LlamaForCausalLM | LlamaForSequenceClassification:
    """Our LLaMA with the folder's weights, rounded to `model.dtype` and held in `compute`; all of it float32 for full
    tuning; its projections quantised on `device` for qlora.

    rows: size of the vocabulary, where it is larger than the base's. objective reward puts a score, drawn by the
    training's seed and in float32, in the place of the head.
    """
    scaling, max_length = recipe.model.rope_scaling, recipe.sequence.max_length
    dtype = torch.float32 if recipe.adapter.method == "full" else DTYPES[recipe.model.dtype]
    if recipe.adapter.method == "qlora":
        model = load_quantised(
            folder,
            recipe.adapter,
            dtype,
            compute=compute,
            device=device,
            rope_scaling=scaling,
            max_length=max_length,
        )
    else:
        model = load_model(folder, dtype, compute_dtype=compute, rope_scaling=scaling, max_length=max_length)
    if rows > model.config.vocab_size:
        resize_embeddings(model, rows)
    return as_reward_model(model, recipe.training.seed) if recipe.training.objective == "reward" else model
