"""How many weights a recipe trains, from shapes alone. No torch."""

from __future__ import annotations

import re
from math import prod

from llama_ft.llama.shapes import Shape
from llama_ft.recipe.check_adapter import matched
from llama_ft.recipe.schema import Adapter


def trained_weights(shape: Shape, adapter: Adapter, *, new_tokens: bool = False, reward: bool = False) -> int:
    """Weights that training changes: factors, DoRA's lengths, and what is trained whole.

    Σ r·(in + out) over the targets (arXiv 2106.09685), and one length per output row for DoRA (arXiv 2402.09353).
    reward: a score stands in the place of the head.
    """
    factors = sum(adapter.r * (out + into) + (out if adapter.dora else 0) for out, into in target_sizes(shape, adapter))
    return factors + sum(map(prod, whole_sizes(shape, adapter, new_tokens=new_tokens, reward=reward)))


def target_sizes(shape: Shape, adapter: Adapter) -> list[tuple[int, int]]:
    """(out, in) of every projection that carries factors; none in full tuning."""
    if adapter.method == "full":
        return []
    return [shape.projections[name.rpartition(".")[2]] for name in matched(adapter.targets, shape.layers)]


def whole_sizes(
    shape: Shape, adapter: Adapter, *, new_tokens: bool = False, reward: bool = False
) -> list[tuple[int, ...]]:
    """Shapes of the weights that are trained themselves: all, less `freeze`; or `modules_to_save` beside an adapter.

    new_tokens: the tokenizer has more tokens than the base, so embedding and head are. A tied head is the embedding.
    reward: there is no head but a score, which is trained in any case.
    """
    if adapter.method == "full":
        return [size for name, size in weight_names(shape, reward=reward).items() if not is_frozen(name, adapter)]
    saved = {*adapter.modules_to_save, *(("embed_tokens", "lm_head") if new_tokens else ())}
    tables = len(saved & ({"embed_tokens"} if reward else {"embed_tokens", "lm_head"}))
    if shape.tied:
        tables = min(1, tables)
    norms = 2 * shape.layers + 1 if "norms" in saved else 0
    score = [(1, shape.hidden)] if reward else []
    return [*[(shape.vocabulary, shape.hidden)] * tables, *[(shape.hidden,)] * norms, *score]


def is_frozen(name: str, adapter: Adapter) -> bool:
    """Whether full tuning leaves this weight as it is."""
    return any(re.search(pattern, name) for pattern in adapter.freeze)


def weight_names(shape: Shape, *, reward: bool = False) -> dict[str, tuple[int, ...]]:
    """Every weight of a LLaMA by Hugging Face's name, with its shape; a tied head is the embedding.

    reward: of a reward model, which has a score in the head's place.
    """
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
    if reward:
        names["score.weight"] = (1, shape.hidden)
    elif not shape.tied:
        names["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return names
