"""How far a model reads, and what its config says of that after RoPE scaling.

A config has one length, `max_position_embeddings`, and readers take it in two ways. The rule here serves all of them:

- `linear`, `dynamic`: max_position_embeddings stays the *original* length. transformers' dynamic formula divides by it
  (modeling_rope_utils); vLLM multiplies it by the factor (`_get_and_verify_max_len`, and the tables of its linear and
  dynamic RoPE); published models do so (Vicuna 1.5 16K: 4096 and factor 4). llama.cpp takes it as the trained length:
  give its `--ctx-size` for more.
- `yarn`, `llama3`: max_position_embeddings is the *extended* length, and rope_parameters hold
  original_max_position_embeddings. transformers expects their ratio to be yarn's factor; vLLM takes the original times
  the factor for yarn and the length as it stands for llama3; llama.cpp's converter writes both. Llama 3.1 (131,072 from
  8,192) and the YaRN authors' Llama 2 (131,072 from 4,096) are published so.
- `default` with another theta: max_position_embeddings is the longer of the base's and the recipe's max_length, as in
  Code Llama (16,384 with theta 1e6): nothing else says how far a new theta was trained.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from llama_ft.recipe.rope import reach
from llama_ft.recipe.schema_model import RopeScaling


def rope_of(config: LlamaConfig) -> dict[str, Any]:
    """The config's RoPE parameters, with `rope_type` and `rope_theta`."""
    return {"rope_type": "default", "rope_theta": 10_000.0, **(config.rope_parameters or {})}


def original_context(config: LlamaConfig) -> int:
    """Tokens that the frequencies were made for, before any scaling."""
    return rope_of(config).get("original_max_position_embeddings") or config.max_position_embeddings


def context_length(config: LlamaConfig) -> int:
    """Tokens that the model reads, its scaling counted in."""
    rope = rope_of(config)
    if rope["rope_type"] in ("linear", "dynamic"):
        return int(config.max_position_embeddings * rope["factor"])
    return config.max_position_embeddings


def scale_rope(config: LlamaConfig, scaling: RopeScaling, max_length: int = 0) -> LlamaConfig:
    """Puts a recipe's RoPE scaling in place of the config's own, by the rule above; a second time changes nothing.

    max_length: longest document of the training. Returns the same config.
    """
    original = scaling.original_max_position_embeddings or original_context(config)
    length = reach(scaling.parameters(), original, config.max_position_embeddings)
    parameters = {"rope_theta": float(rope_of(config)["rope_theta"]), **scaling.parameters()}
    if scaling.rope_type in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = original
    config.rope_parameters = parameters
    if length is None:
        config.max_position_embeddings = max(config.max_position_embeddings, max_length)
    else:
        config.max_position_embeddings = original if scaling.rope_type in ("linear", "dynamic") else length
    return config
