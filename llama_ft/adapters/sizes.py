"""How many weights a recipe trains, from shapes alone. No torch."""

from __future__ import annotations

import re
from math import prod

from llama_ft.llama.shapes import Shape
from llama_ft.recipe.check_adapter import matched
from llama_ft.recipe.schema import Adapter


def trained_weights(shape: Shape, adapter: Adapter, *, new_tokens: bool = False) -> int:
    """Weights that training changes.

    full: all but the frozen ones. Adapters: Σ r·(in + out) over the targets (arXiv 2106.09685), one length per output
    row for DoRA (arXiv 2402.09353), and the modules that are trained whole; `new_tokens`: embedding and head are.
    """
    if adapter.method == "full":
        sizes = {name: prod(size) for name, size in weight_names(shape).items()}
        return sum(size for name, size in sizes.items() if not is_frozen(name, adapter))
    total = 0
    for name in matched(adapter.targets, shape.layers):
        out, into = shape.projections[name.rpartition(".")[2]]
        total += adapter.r * (out + into) + (out if adapter.dora else 0)
    whole = {*adapter.modules_to_save, *(("embed_tokens", "lm_head") if new_tokens else ())}
    table = shape.vocabulary * shape.hidden
    tables = (
        min(1, len(whole & {"embed_tokens", "lm_head"})) if shape.tied else len(whole & {"embed_tokens", "lm_head"})
    )
    return total + tables * table + ((2 * shape.layers + 1) * shape.hidden if "norms" in whole else 0)


def is_frozen(name: str, adapter: Adapter) -> bool:
    """Whether full tuning leaves this weight as it is."""
    return any(re.search(pattern, name) for pattern in adapter.freeze)


def weight_names(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every weight of a LLaMA by Hugging Face's name, with its shape; a tied head is the embedding."""
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        place = f"model.layers.{layer}"
        for projection, size in shape.projections.items():
            attention = projection in ("q_proj", "k_proj", "v_proj", "o_proj")
            linear = f"{place}.{'self_attn' if attention else 'mlp'}.{projection}"
            names[f"{linear}.weight"] = size
            if shape.attention_bias if attention else shape.mlp_bias:
                names[f"{linear}.bias"] = size[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"{place}.{norm}.weight"] = (shape.hidden,)
    names["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        names["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return names
