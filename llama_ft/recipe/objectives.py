"""Objectives in groups, the keys that each of them reads, and the reference that a recipe comes to. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from llama_ft.recipe.fields import fields_of
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.schema_objective import Preference, RewardModel
from llama_ft.recipe.schema_online import Policy, Reward, Sampling

PAIRS = ("reward", "dpo", "orpo", "simpo")
"""Objectives that compare a better with a worse answer."""
COMPARED = (*PAIRS, "kto")
"""Objectives on pairs or judged answers, which lose their meaning when cut."""
POLICY = ("grpo", "rloo")
"""Objectives that learn from all sampled answers by their scores."""
ONLINE = (*POLICY, "rejection_sampling")
"""Objectives that sample answers and score them."""
SECTIONS = {"preference": Preference, "reward_model": RewardModel, "sampling": Sampling, "policy": Policy}
"""Sections that only some objectives read, beside the list `rewards`."""


def _all(section: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in fields_of(SECTIONS[section]))


def _some(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


_SCORED = (*_all("sampling"), "rewards")
_LEARNED = (*_SCORED, "preference.reference", *_some("policy", "kl", "max_kl"))
READS: dict[str, tuple[str, ...]] = {
    "reward": _all("reward_model"),
    "dpo": _some("preference", "loss", "beta", "label_smoothing", "length_normalised", "sft_weight", "reference"),
    "kto": _some("preference", "beta", "desirable_weight", "undesirable_weight", "reference"),
    "orpo": _some("preference", "beta"),
    "simpo": _some("preference", "beta", "sft_weight", "margin"),
    "grpo": _LEARNED,
    "rloo": (*_LEARNED, "policy.whiten"),
    "rejection_sampling": _SCORED,
}
"""Dotted keys of those sections that an objective reads; what is not here reads none of them."""
KEYS = (*(key for section in SECTIONS for key in _all(section)), "rewards")
"""All of them."""


class Idle(NamedTuple):
    """A key that an objective reads, and a value of another key, `choice`, that makes it mean nothing."""

    objectives: tuple[str, ...]
    key: str
    choice: str
    is_idle: Callable[[Any], bool]
    what: str


IDLE = (
    Idle(
        ("dpo",),
        "preference.label_smoothing",
        "preference.loss",
        lambda loss: loss not in ("sigmoid", "robust"),
        "label_smoothing belongs to loss: sigmoid and robust",
    ),
    Idle(
        ("dpo",),
        "preference.length_normalised",
        "preference.loss",
        lambda loss: loss != "sigmoid",
        "length_normalised belongs to loss: sigmoid",
    ),
    Idle(POLICY, "preference.reference", "policy.kl", lambda kl: kl == 0, "with kl: 0 there is no reference"),
    Idle(POLICY, "policy.max_kl", "policy.kl", lambda kl: kl == 0, "with kl: 0 there is no reference to be far from"),
)
IDLE_REWARD = (
    Idle(ONLINE, "pattern", "function", lambda function: function != "format", "pattern belongs to function: format"),
    Idle(ONLINE, "target", "function", lambda function: function != "length", "target belongs to function: length"),
    Idle(ONLINE, "timeout", "model", lambda model: model is not None, "timeout belongs to functions, not to a model"),
)
"""The same inside an entry of `rewards`."""


def idle_keys(objective: str, value: Callable[[str], Any], rewards: int) -> Iterator[Idle]:
    """What is idle among the keys that an objective reads, dotted keys in full.

    `value(key)` gives a dotted key's value, or raises LookupError where it has none; `rewards` counts that list.
    """
    every = [*IDLE]
    for number in range(rewards):
        place = f"rewards.{number}"
        every += [rule._replace(key=f"{place}.{rule.key}", choice=f"{place}.{rule.choice}") for rule in IDLE_REWARD]
    for rule in every:
        with suppress(LookupError):
            if objective in rule.objectives and rule.is_idle(value(rule.choice)):
                yield rule


def unused_objective_keys(recipe: Recipe) -> tuple[str, ...]:
    """Dotted keys of preference, reward_model, sampling, rewards and policy that mean nothing in a recipe."""
    objective, data = recipe.training.objective, recipe.model_dump(include={*SECTIONS, "rewards"})
    unread = {key for key in KEYS if key not in READS.get(objective, ())}
    if "rewards" in unread:
        unread |= {f"rewards.{number}.{name}" for number in range(len(recipe.rewards)) for name in fields_of(Reward)}
    idle = idle_keys(objective, lambda key: value_at(data, key), len(recipe.rewards))
    return tuple(sorted(unread | {rule.key for rule in idle}))


def value_at(data: Any, key: str) -> Any:
    """The value at a dotted key of nested dicts and lists. Raises LookupError where there is none."""
    for part in key.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def without(data: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A recipe's dict without some dotted keys, and without the sections that they leave empty."""
    gone = set(keys)

    def rest(value: Any, path: str) -> Any:
        if isinstance(value, list):
            return [rest(part, f"{path}.{number}") for number, part in enumerate(value)]
        if not isinstance(value, dict):
            return value
        below = {name: f"{path}.{name}" if path else name for name in value}
        kept = {name: rest(part, below[name]) for name, part in value.items() if below[name] not in gone}
        return {name: part for name, part in kept.items() if part != {} or value[name] == {}}

    return rest(data, "")


def reference_of(recipe: Recipe) -> str:
    """What the model is compared with: `none`, `adapter_off`, `precomputed` or `copy`; `auto` resolved."""
    objective, stated = recipe.training.objective, recipe.preference.reference
    if "preference.reference" not in READS.get(objective, ()) or (objective in POLICY and recipe.policy.kl == 0):
        return "none"
    if stated != "auto":
        return stated
    if recipe.adapter.method != "full":
        return "adapter_off"
    return "copy" if objective in POLICY else "precomputed"
