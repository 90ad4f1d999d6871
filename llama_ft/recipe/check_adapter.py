"""Combinations in `adapter` that cannot work: keys of one method beside another, targets that no LLaMA has."""

from __future__ import annotations

import re
from collections.abc import Callable

from llama_ft.errors import did_you_mean, nearest
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.view import View
from llama_ft.recipe.yaml_words import one_line

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What an adapter can sit on in a LLaMA, by HF's parameter names."""
GROUPS = ("all-linear", "attention")
"""What `targets` calls several projections; any other text is a regex."""
OF_LORA = ("r", "alpha", "dropout", "targets", "rslora", "dora", "lora_plus", "modules_to_save")
OF_QLORA = ("bits", "double_quant")
UNUSED = {"full": (*OF_LORA, *OF_QLORA), "lora": (*OF_QLORA, "freeze"), "qlora": ("freeze",)}
_DEEPEST = 256
"""Layers that a regex is tried on: more than the largest LLaMA has (126)."""


def module_names(layers: int) -> list[str]:
    """The projections of a LLaMA as PEFT names them: `model.layers.0.self_attn.q_proj`, …"""
    return [
        f"model.layers.{layer}.{'self_attn' if name in PROJECTIONS[:4] else 'mlp'}.{name}"
        for layer in range(layers)
        for name in PROJECTIONS
    ]


def matched(targets: str | list[str], layers: int) -> list[str]:
    """The full names that `adapter.targets` means in a model of that many layers."""
    if isinstance(targets, str) and targets not in GROUPS:
        return [name for name in module_names(layers) if re.fullmatch(targets, name)]
    named = {"all-linear": PROJECTIONS, "attention": PROJECTIONS[:4]}[targets] if isinstance(targets, str) else targets
    return [name for name in module_names(layers) if name.rpartition(".")[2] in named]


def unused_adapter_keys(recipe: Recipe) -> tuple[str, ...]:
    """Keys of `adapter` that mean nothing beside its method."""
    adapter = recipe.adapter
    eight_bits = adapter.method == "qlora" and adapter.bits == 8
    return (*UNUSED[adapter.method], *(("double_quant",) if eight_bits else ()))


def keys_belong_to_method(view: View) -> None:
    """What a parent says of its adapter is no mistake of the recipe, or the override, that chose another method."""
    method = view.value("adapter.method")
    for name in UNUSED[method]:
        key = f"adapter.{name}"
        if not view.stated_beside(key, "adapter.method"):
            continue
        if method == "full":
            owner = "lora and qlora" if name in OF_LORA else "qlora"
            view.wrong(key, f"{name} belongs to {owner}, method: full trains every weight", "remove it")
        elif name == "freeze":
            hint = "remove it; targets says which layers get an adapter"
            view.wrong(key, f"freeze belongs to full, {method} trains nothing of the base", hint)
        else:
            view.wrong(
                key, f"{name} belongs to qlora, method: lora does not quantise", "remove it, or write method: qlora"
            )


def targets_exist(view: View) -> None:
    targets = view.value("adapter.targets")
    if isinstance(targets, str):
        _pattern_exists(view, targets)
        return
    for number, name in enumerate(targets):
        if name not in PROJECTIONS:
            what = f"a LLaMA has no projection '{one_line(name)}'"
            view.wrong(f"adapter.targets.{number}", what, did_you_mean(name[:100].lower(), PROJECTIONS))


def _pattern_exists(view: View, targets: str) -> None:
    if targets in GROUPS:
        return
    is_word = re.fullmatch(r"[\w-]+", targets)
    near = nearest(targets[:100].lower(), (*GROUPS, *PROJECTIONS)) if is_word else None
    if near is not None:
        hint = f"write a list: [{near}]" if targets == near else f"did you mean '{near}'?"
        what = f"a LLaMA has no projections called '{one_line(targets)}'"
        view.wrong("adapter.targets", what, hint, of_value=True)
        return
    try:
        found = matched(targets, _DEEPEST)
    except re.error as error:
        what = f"'{one_line(targets)}' is no regex: {error}"
        view.wrong("adapter.targets", what, "all-linear, attention, or a list", of_value=True)
        return
    if not found:
        hint = r"it must match whole names, such as model.layers.0.mlp.up_proj: .*layers\.\d+\.mlp\..*"
        what = f"the regex '{one_line(targets)}' matches no projection of a LLaMA"
        view.wrong("adapter.targets", what, hint, of_value=True)


def freeze_is_a_regex(view: View) -> None:
    for number, pattern in enumerate(view.value("adapter.freeze")):
        try:
            re.compile(pattern)
        except re.error as error:
            view.wrong(f"adapter.freeze.{number}", f"'{one_line(pattern)}' is no regex: {error}", None)


def double_quant_needs_four_bits(view: View) -> None:
    if (
        view.value("adapter.method") == "qlora"
        and view.value("adapter.bits") == 8
        and view.stated_beside("adapter.double_quant", "adapter.bits")
    ):
        what = "double_quant belongs to bits: 4, eight bits have one scale per row"
        view.wrong("adapter.double_quant", what, "remove it")


RULES: tuple[Callable[[View], None], ...] = (
    keys_belong_to_method,
    targets_exist,
    freeze_is_a_regex,
    double_quant_needs_four_bits,
)
