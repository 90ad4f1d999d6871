"""Keys of preference, reward_model, sampling, rewards and policy against the objective that would read them."""

from __future__ import annotations

from collections.abc import Callable

from llama_ft.recipe.objectives import KEYS, POLICY, READS, idle_keys
from llama_ft.recipe.view import View

NEAREST = {
    ("preference.beta", "grpo"): "write policy.kl, the weight of the KL",
    ("preference.beta", "rloo"): "write policy.kl, the weight of the KL",
    ("preference.margin", "reward"): "write reward_model: {margin: true}, and each pair's margin in its row",
    ("preference.reference", "orpo"): "remove it, orpo has no reference",
    ("preference.reference", "simpo"): "remove it, simpo has no reference",
    ("reward_model.margin", "simpo"): "write preference.margin",
    ("policy.kl", "dpo"): "write preference.beta: the larger, the nearer to the reference",
    ("policy.kl", "kto"): "write preference.beta: the larger, the nearer to the reference",
    ("policy.whiten", "grpo"): "remove it, grpo always normalises within a prompt's answers",
    ("rewards", "reward"): "remove it, a reward model learns from pairs; grpo and rloo name its run in rewards",
}
"""What was meant by a key beside an objective that does not read it, where it is not another objective."""


def keys_belong_to_objective(view: View) -> None:
    """What a parent says to its objective is no mistake of the recipe, or the override, that chose another one."""
    objective = view.value("training.objective")
    read = READS.get(objective, ())
    for key in KEYS:
        if key in read or not view.stated_beside(key, "training.objective"):
            continue
        if key == "rewards" and not view.rewards():
            continue
        owners = [name for name, keys in READS.items() if key in keys]
        what = f"{key.rpartition('.')[2]} belongs to {', '.join(owners)}; {objective} does not read it"
        hint = NEAREST.get((key, objective), f"remove it, or write objective: {owners[0]}")
        view.wrong(key, what, hint)


def keys_have_an_effect(view: View) -> None:
    """Keys that the objective reads, but another value makes meaningless."""
    for rule in idle_keys(view.value("training.objective"), view.value, len(view.rewards())):
        if view.stated_beside(rule.key, rule.choice):
            view.wrong(rule.key, rule.what, "remove it")


def robust_knows_the_noise(view: View) -> None:
    if view.value("training.objective") != "dpo" or view.value("preference.loss") != "robust":
        return
    if view.value("preference.label_smoothing") == 0:
        what = "robust with label_smoothing 0 is sigmoid"
        hint = "add label_smoothing: 0.1, the share of pairs that are labelled the wrong way round, or write sigmoid"
        view.wrong("preference.loss", what, hint)


def reference_can_be_had(view: View) -> None:
    objective, key = view.value("training.objective"), "preference.reference"
    if key not in READS.get(objective, ()):
        return
    reference, full = view.value(key), view.value("adapter.method") == "full"
    online = objective in POLICY
    if reference == "adapter_off" and full:
        hint = "write copy" if online else "write precomputed, or copy"
        view.wrong(key, "method: full has no adapter that could be switched off", hint)
    elif reference == "precomputed" and online:
        what = f"{objective} samples its answers, nothing about them can be known before"
        view.wrong(key, what, "write copy" if full else "write adapter_off, or copy")


def noise_is_for_text(view: View) -> None:
    objective = view.value("training.objective")
    if view.value("training.neftune_alpha") is not None and objective not in ("sft", "pretrain"):
        what = f"NEFTune's noise is for sft and pretrain, {objective} compares answers, which it would blur"
        view.wrong("training.neftune_alpha", what, "remove it, or write null")


def reward_model_has_no_head(view: View) -> None:
    """A score stands in the head's place, and is always trained."""
    if view.value("training.objective") != "reward" or view.value("adapter.method") == "full":
        return
    if "lm_head" in view.value("adapter.modules_to_save"):
        hint = "remove lm_head, its score is trained in any case"
        view.wrong("adapter.modules_to_save", "a reward model has no lm_head", hint)


RULES: tuple[Callable[[View], None], ...] = (
    keys_belong_to_objective,
    keys_have_an_effect,
    robust_knows_the_noise,
    reference_can_be_had,
    noise_is_for_text,
    reward_model_has_no_head,
)
