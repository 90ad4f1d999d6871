"""A GGUF file's weights in transformers' own LlamaForCausalLM in float32: whole, or read from the file when needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llama_ft.export.gguf.asked import Asked
from llama_ft.export.proof import Seen, observe, pick_device
from llama_ft.export.streamed import Parts, _fill, observe_streamed
from llama_ft.llama.checkpoints.layout import Weights
from llama_ft.llama.load import check_fit, quiet_transformers


def ask_file(weights: Weights, asked: Asked) -> Seen:
    """What the file's weights say to what merged/ was asked. UserError where they do not fit their own config."""
    if asked.streamed:
        return observe_streamed(streamed_model(weights), asked.documents)
    model = whole_model(weights)
    # With the merged model's own settings of generation: the file's end tokens are checked as entries.
    model.generation_config = GenerationConfig.from_pretrained(asked.merged)
    return observe(model.to(pick_device(model)), asked.documents, [prompt.ids for prompt in asked.prompts])


def whole_model(weights: Weights) -> Any:
    """All weights in memory, 4 bytes each."""
    state = {name: weights.read(name).float() for name in weights.shapes}
    load: Any = LlamaForCausalLM.from_pretrained
    config = LlamaConfig(**weights.config)
    with quiet_transformers():
        model, report = load(None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True)
    check_fit(report, weights.where)
    return model


def streamed_model(weights: Weights) -> Any:
    """One weight in memory at a time; its shapes were checked when the file was opened."""
    config = LlamaConfig(**weights.config)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)

    def parts(name: str) -> Parts:
        def read() -> Iterator[tuple[slice, Tensor]]:
            weight = weights.read(name).float()
            yield slice(0, weight.shape[0]), weight

        return read

    _fill(model, parts, lambda name: None)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model
