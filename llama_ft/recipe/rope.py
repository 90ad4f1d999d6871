"""RoPE scaling in a recipe: which keys belong together, and how far a base reads with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llama_ft.recipe.fields import fields_of
from llama_ft.recipe.schema_model import PRESETS, ROPE_KEYS, RopeScaling
from llama_ft.recipe.view import View
from llama_ft.recipe.yaml_words import one_line

SECTION = "model.rope_scaling"
CONTEXT = {"smollm2-135m": (8192, 8192), **{f"preset:{name}": context for name, context in PRESETS.items()}}
"""Tokens a base reads before and after its own RoPE scaling, where that is known without its config (SmolLM2's
config.json, llama_ft.llama.shapes)."""


def reach(scaling: Mapping[str, Any], original: int, context: int) -> int | None:
    """Tokens a base reads with `scaling`: factor × its original context; None where no number follows (theta alone).

    original: the base's context before its own RoPE scaling, unless `scaling` states one. context: what it reads as it
    is. llama3 stretches the lowest frequencies alone and Meta uses it for 16 × 8,192 tokens with a factor of 8: a base
    that reads further already keeps that.
    """
    if scaling["rope_type"] == "default":
        return None
    original = scaling.get("original_max_position_embeddings") or original
    length = int(scaling["factor"] * original)
    return max(length, context) if scaling["rope_type"] == "llama3" else length


def keys_fit_type(view: View) -> None:
    """Each type of scaling has the keys it needs, and none of another. A parent's keys for another type are dropped."""
    kind = view.value(f"{SECTION}.rope_type")
    chosen = view.mark(f"{SECTION}.rope_type").source.nearness
    needed, optional = ROPE_KEYS[kind]
    for name, field in fields_of(RopeScaling).items():
        key = f"{SECTION}.{name}"
        if name in needed and not view.stated(key):
            what = f"{name} is missing, rope_type: {kind} needs it"
            hint = f"add '{name}: {_EXAMPLES[name]}' ({field.description.rstrip('.')})"
            view.wrong(key, what, hint, of_value=True)
        elif name in ("rope_type", *needed, *optional) or not view.stated(key):
            continue
        elif view.mark(key).source.nearness >= chosen:
            owners = ", ".join(other for other, keys in ROPE_KEYS.items() if name in (*keys[0], *keys[1]))
            view.wrong(key, f"{name} belongs to {owners}, rope_type: {kind} does not use it", "remove it")


_EXAMPLES = {"factor": "4.0", "rope_theta": "1000000.0", "low_freq_factor": "1.0", "high_freq_factor": "4.0"}


def bounds_are_in_order(view: View) -> None:
    """A band between two borders needs its upper one above its lower one."""
    kind = view.value(f"{SECTION}.rope_type")
    pairs = {"llama3": ("high_freq_factor", "low_freq_factor", None, None), "yarn": ("beta_fast", "beta_slow", 32, 1)}
    if kind not in pairs:
        return
    upper, lower, upper_default, lower_default = pairs[kind]
    high = view.value(f"{SECTION}.{upper}") or upper_default
    low = view.value(f"{SECTION}.{lower}") or lower_default
    if high is not None and low is not None and high <= low:
        key = upper if view.stated(f"{SECTION}.{upper}") else lower
        view.wrong(f"{SECTION}.{key}", f"{upper} is {high:g} and {lower} {low:g}", f"{upper} is the larger one")


def one_attention_factor(view: View) -> None:
    """YaRN's scale of cos and sin is stated, or computed from both mscales: half of a pair would be passed over."""
    if view.value(f"{SECTION}.rope_type") != "yarn":
        return
    stated = [name for name in ("mscale", "mscale_all_dim") if view.stated(f"{SECTION}.{name}")]
    if len(stated) == 1:
        other = "mscale" if stated == ["mscale_all_dim"] else "mscale_all_dim"
        view.wrong(f"{SECTION}.{stated[0]}", f"{stated[0]} does nothing without {other}", f"add {other}, or remove it")
    elif stated and view.stated(f"{SECTION}.attention_factor"):
        what = "attention_factor is stated, so mscale and mscale_all_dim do nothing"
        view.wrong(f"{SECTION}.attention_factor", what, "write one or the other")


def max_length_fits_base(view: View) -> None:
    """Documents are no longer than the base reads. A preset without scaling takes its context from the recipe."""
    base, length = view.value("model.base"), view.value("sequence.max_length")
    scaling = view.value(SECTION)
    if base not in CONTEXT or (scaling is None and base.startswith("preset:")):
        return
    with suppress(KeyError):  # a key that is missing has been reported
        fault = too_long(base, length, scaling, *CONTEXT[base])
        if fault is not None:
            view.wrong("sequence.max_length", *fault)


def too_long(
    base: str, length: int, scaling: Mapping[str, Any] | None, original: int, context: int
) -> tuple[str, str] | None:
    """What is wrong with documents of `length` tokens on a base that reads `context`, and what to do; None if nothing.

    `original` and `scaling` as in :func:`reach`; raises KeyError where `scaling` is not whole.
    """
    if scaling is None:
        limit, by, advice = context, "", "set model.rope_scaling"
    else:
        start = scaling.get("original_max_position_embeddings") or original
        limit, by = reach(scaling, original, context) or length, f" with rope_type: {scaling['rope_type']}"
        advice = f"a factor of {math.ceil(length / start)}"
    if length <= limit:
        return None
    what = f"{length} tokens are more than {one_line(base)} can read, {limit}{by}"
    return what, f"write {limit} or less, or {advice}"


RULES = (keys_fit_type, bounds_are_in_order, one_attention_factor, max_length_fits_base)
