"""Combinations in `sampling`, `rewards` and `policy` that cannot work; only for objectives that sample answers."""

from __future__ import annotations

import re
from collections.abc import Callable

from llama_ft.errors import did_you_mean
from llama_ft.recipe.objectives import ONLINE, POLICY
from llama_ft.recipe.schema_online import FUNCTIONS
from llama_ft.recipe.view import View
from llama_ft.recipe.yaml_words import one_line

OWN_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
"""A user's own reward: a file, and the name of a function in it."""


def answers_are_scored(view: View) -> None:
    objective = view.value("training.objective")
    if objective in ONLINE and not view.value("rewards"):
        what = f"{objective} needs rewards: what its answers are scored by"
        view.wrong("rewards", what, "add 'rewards: [{model: RUN}]', or [{function: exact_match}]")


def answers_differ(view: View) -> None:
    """Scores of one prompt's answers are compared, so that they must be several, and not all the same."""
    objective = view.value("training.objective")
    if objective not in ONLINE:
        return
    if view.value("sampling.temperature") == 0:
        what = "at temperature 0 all answers to a prompt are the same"
        view.wrong("sampling.temperature", what, "write a number above 0, e.g. 1.0")
    if objective in POLICY and view.value("sampling.answers") < 2:
        what = f"{objective} compares the answers to a prompt with each other, one has none to be compared with"
        view.wrong("sampling.answers", what, "write 2 or more")


def samples_are_the_models_own(view: View) -> None:
    objective = view.value("training.objective")
    if objective in POLICY and view.value("sampling.top_p") != 1:
        what = f"{objective} needs top_p: 1.0, below it answers are not drawn with the model's log-probabilities"
        view.wrong("sampling.top_p", what, "remove it")


def batch_holds_whole_groups(view: View) -> None:
    if view.value("training.objective") not in POLICY:
        return
    batch, answers = view.value("training.global_batch"), view.value("sampling.answers")
    if batch % answers:
        near = max(1, round(batch / answers)) * answers
        place = "training.global_batch" if view.stated("training.global_batch") else "sampling.answers"
        what = f"a global batch of {batch} answers cannot be made of prompts with {answers} answers each"
        view.wrong(place, what, f"write global_batch: {near}")


def prompts_fit_beside_answers(view: View) -> None:
    if view.value("training.objective") not in ONLINE:
        return
    length, new = view.value("sequence.max_length"), view.value("sampling.max_new_tokens")
    if new >= length:
        place = "sampling.max_new_tokens" if view.stated("sampling.max_new_tokens") else "sequence.max_length"
        what = f"answers of {new} tokens leave no room for a prompt in a max_length of {length}"
        view.wrong(place, what, f"write max_new_tokens below {length}, or a longer max_length")


def one_kind_of_reward(view: View, key: str) -> None:
    if any(bad.startswith(f"{key}.") for bad in view.shaped.bad):
        return  # a mistyped key may be the one that is missed here
    model, function = view.value(f"{key}.model"), view.value(f"{key}.function")
    if model is None and function is None:
        hint = "add model: RUN, or function: exact_match"
        view.wrong(key, "a reward needs model (a reward model) or function", hint, of_value=True)
    elif model is not None and function is not None:
        view.wrong(f"{key}.function", "this reward names a model and a function", "make two rewards of them")


def function_is_known(view: View, key: str) -> None:
    function = view.value(f"{key}.function")
    if function is None or function in FUNCTIONS or OWN_FUNCTION.fullmatch(function):
        return
    what = f"no such reward function '{one_line(function)}'"
    hint = did_you_mean(function[:100], (*FUNCTIONS, "FILE.py:NAME"), kind="functions")
    view.wrong(f"{key}.function", what, hint, of_value=True)


def function_has_what_it_needs(view: View, key: str) -> None:
    function, pattern = view.value(f"{key}.function"), view.value(f"{key}.pattern")
    target = view.value(f"{key}.target")
    if function == "format" and pattern is None:
        what = "format needs a pattern: the regex that a whole answer must match"
        view.wrong(f"{key}.pattern", what, "add pattern: '.*The answer is .*'")
    if function == "length" and target is None:
        view.wrong(f"{key}.target", "length needs a target: how many tokens an answer should have", "add target: 100")
    if function == "length" and target is not None and target > view.value("sampling.max_new_tokens"):
        longest = view.value("sampling.max_new_tokens")
        what = f"a target of {target} tokens is never reached, answers end at max_new_tokens: {longest}"
        view.wrong(f"{key}.target", what, f"write {longest} or less")


def pattern_is_a_regex(view: View, key: str) -> None:
    pattern = view.value(f"{key}.pattern")
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        what = f"'{one_line(pattern)}' is no regex: {error}"
        view.wrong(f"{key}.pattern", what, "write Python's re syntax", of_value=True)


def reward_counts(view: View, key: str) -> None:
    if view.value(f"{key}.weight") == 0:
        view.wrong(f"{key}.weight", "a reward of weight 0 does not count", "write another weight, or remove the reward")


RULES: tuple[Callable[[View], None], ...] = (
    answers_are_scored,
    answers_differ,
    samples_are_the_models_own,
    batch_holds_whole_groups,
    prompts_fit_beside_answers,
)
REWARD_RULES: tuple[Callable[[View, str], None], ...] = (
    one_kind_of_reward,
    function_is_known,
    function_has_what_it_needs,
    pattern_is_a_regex,
    reward_counts,
)
"""For each entry of `rewards`, whatever the objective: a wrong entry is wrong in a parent too."""
