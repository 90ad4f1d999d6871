"""Combinations that cannot work, each a small function that reports what is wrong, where, and what to do.

A check that meets a key without a value (wrong, missing, unreadable parent) is skipped; the others still run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from llama_ft.recipe import check_adapter, check_data, check_objective, check_online, check_training, rope
from llama_ft.recipe.engines import unfit
from llama_ft.recipe.launchers import Launcher
from llama_ft.recipe.lookup import SHIPPED_BASE
from llama_ft.recipe.view import Unknown, View
from llama_ft.recipe.yaml_words import one_line


def check(view: View, launcher: Launcher | None) -> None:
    """Reports every impossible combination of a recipe. `launcher` is None when the launch config is unreadable."""
    for rule in RULES:
        with suppress(Unknown):
            rule(view)
    for key in view.sources():
        for source_rule in check_data.SOURCE_RULES:
            with suppress(Unknown):
                source_rule(view, key)
    for key in view.rewards():
        for reward_rule in check_online.REWARD_RULES:
            with suppress(Unknown):
                reward_rule(view, key)
    if launcher is not None:
        with suppress(Unknown):
            float16_on_cpu(view, launcher)
        with suppress(Unknown):
            engine_can_train(view, launcher)


def gguf_can_be_made(view: View) -> None:
    """GGUF files are made of merged/, and llama.cpp knows no reward model of this kind."""
    if not view.value("export.gguf"):
        return
    if view.value("training.objective") == "reward":
        view.wrong("export.gguf", "a reward model has no GGUF form", "remove gguf")
    elif view.value("export.merged") is False:
        view.wrong("export.gguf", "GGUF files are made of merged/, and export.merged is false", "write merged: true")


def sampling_is_for_answers(view: View) -> None:
    """A reward model writes none, and without merged/ there is no file to say it in."""
    if view.value("export.sampling") is None:
        return
    if view.value("training.objective") == "reward":
        view.wrong("export.sampling", "a reward model writes no answers", "remove sampling")
    elif view.value("export.merged") is False:
        view.wrong("export.sampling", "it is told in merged/, and export.merged is false", "write merged: true")


def float16_on_cpu(view: View, launcher: Launcher) -> None:
    """float16 arithmetic on a CPU runs at nearly no speed at all, with any method."""
    if launcher.use_cpu and view.value("model.dtype") == "float16":
        method = view.value("adapter.method")
        what = f"{method} with float16 cannot run on a CPU, which the launch config asks for"
        view.wrong("model.dtype", what, "write bfloat16 or float32, or another launch config")


def engine_can_train(view: View, launcher: Launcher) -> None:
    """The launch config's engine takes this method, this optimizer and this objective."""
    method = view.value("adapter.method")
    found = unfit(
        launcher.engine,
        method=method,
        optimizer=view.value("training.optimizer"),
        dora=view.value("adapter.dora"),
        whole_modules=method != "full" and bool(view.value("adapter.modules_to_save")),
        objective=view.value("training.objective"),
        reference=view.value("preference.reference"),
    )
    for key, what, hint in found:
        view.wrong(key if view.stated(key) else "launch", what, hint)


def preset_names_a_tokenizer(view: View) -> None:
    base = view.value("model.base")
    if base.startswith("preset:") and view.value("model.tokenizer") is None:
        view.wrong("model.base", f"{base} has no tokenizer of its own", f"add model.tokenizer, e.g. {SHIPPED_BASE}")


def revision_is_of_the_hub(view: View) -> None:
    base = view.value("model.base")
    if view.value("model.revision") is not None and (base == SHIPPED_BASE or base.startswith(("preset:", "/"))):
        view.wrong("model.revision", f"{one_line(base)} is not on the hub and has no revisions", "remove revision")


RULES: tuple[Callable[[View], None], ...] = (
    *rope.RULES,
    preset_names_a_tokenizer,
    revision_is_of_the_hub,
    gguf_can_be_made,
    sampling_is_for_answers,
    *check_adapter.RULES,
    *check_training.RULES,
    *check_data.RULES,
    *check_objective.RULES,
    *check_online.RULES,
)
