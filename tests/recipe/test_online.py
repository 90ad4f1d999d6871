"""Sampling, rewards and policy: combinations that cannot work, and rewards that are looked up beside the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.recipe import load_recipe
from tests.recipe.conftest import GOOD, REWARD, Report, recipe

MISTAKES = {
    "nothing to score by": (
        recipe("grpo", rewards=False),
        "r.yaml:1:1: rewards: grpo needs rewards: what its answers are scored by"
        " — add 'rewards: [{model: RUN}]', or [{function: exact_match}]",
    ),
    "neither": (
        recipe("grpo", "rewards: [{weight: 2}]", rewards=False),
        "r.yaml:6:11: rewards.0: a reward needs model (a reward model) or function"
        " — add model: RUN, or function: exact_match",
    ),
    "both": (
        recipe("grpo", "rewards: [{model: runs/x, function: format, pattern: a}]", rewards=False),
        "r.yaml:6:27: rewards.0.function: this reward names a model and a function — make two rewards of them",
    ),
    "an unknown function": (
        recipe("grpo", "rewards: [{function: exact_mach}]", rewards=False),
        "r.yaml:6:22: rewards.0.function: no such reward function 'exact_mach' — did you mean 'exact_match'?",
    ),
    "a format without a pattern": (
        recipe("grpo", "rewards: [{function: format}]", rewards=False),
        "r.yaml:6:11: rewards.0.pattern: format needs a pattern: the regex that a whole answer must match"
        " — add pattern: '.*The answer is .*'",
    ),
    "a pattern that is none": (
        recipe("grpo", "rewards: [{function: format, pattern: '(a'}]", rewards=False),
        "r.yaml:6:39: rewards.0.pattern: '(a' is no regex: missing ), unterminated subpattern at position 0"
        " — write Python's re syntax",
    ),
    "a length without a target": (
        recipe("rloo", "rewards: [{function: length}]", rewards=False),
        "r.yaml:6:11: rewards.0.target: length needs a target: how many tokens an answer should have — add target: 100",
    ),
    "a target out of reach": (
        recipe("rloo", "rewards: [{function: length, target: 300}]", rewards=False),
        "r.yaml:6:30: rewards.0.target: a target of 300 tokens is never reached, answers end at max_new_tokens: 256"
        " — write 256 or less",
    ),
    "a pattern of another function": (
        recipe("rloo", "rewards: [{function: code, pattern: a}]", rewards=False),
        "r.yaml:6:28: rewards.0.pattern: pattern belongs to function: format — remove it",
    ),
    "a target of a model": (
        recipe("rloo", "rewards: [{model: runs/x, target: 9, timeout: 3}]", rewards=False),
        "r.yaml:6:27: rewards.0.target: target belongs to function: length — remove it\n"
        "r.yaml:6:38: rewards.0.timeout: timeout belongs to functions, not to a model — remove it",
    ),
    "no weight": (
        recipe("rloo", "rewards: [{function: code, weight: 0.0}]", rewards=False),
        "r.yaml:6:28: rewards.0.weight: a reward of weight 0 does not count"
        " — write another weight, or remove the reward",
    ),
    "answers that are all the same": (
        recipe("rejection_sampling", "sampling: {temperature: 0}"),
        "r.yaml:6:12: sampling.temperature: at temperature 0 all answers to a prompt are the same"
        " — write a number above 0, e.g. 1.0",
    ),
    "one answer": (
        recipe("grpo", "sampling: {answers: 1}"),
        "r.yaml:6:12: sampling.answers: grpo compares the answers to a prompt with each other, one has none to be"
        " compared with — write 2 or more",
    ),
    "a sampler of its own": (
        recipe("grpo", "sampling: {top_p: 0.9}"),
        "r.yaml:6:12: sampling.top_p: grpo needs top_p: 1.0, below it answers are not drawn with the model's"
        " log-probabilities — remove it",
    ),
    "half a group": (
        GOOD + "training: {objective: rloo, global_batch: 12}\n" + REWARD,
        "r.yaml:5:29: training.global_batch: a global batch of 12 answers cannot be made of prompts with 8 answers each"
        " — write global_batch: 16",
    ),
    "micro-batches of prompts": (
        GOOD + "training: {objective: rloo, global_batch: 64, micro_batch: 16}\n" + REWARD,
        "r.yaml:5:47: training.micro_batch: a global batch of 8 prompts cannot be made of micro-batches of 16"
        " — write 8, or auto",
    ),
    "no room for a prompt": (
        recipe("rloo", "sequence: {max_length: 256}"),
        "r.yaml:6:12: sequence.max_length: answers of 256 tokens leave no room for a prompt in a max_length of 256"
        " — write max_new_tokens below 256, or a longer max_length",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_said(report: Report, text: str, expected: str) -> None:
    assert report(text) == expected.split("\n")


def test_rewards_are_found_beside_the_recipe_and_their_functions_are_not_run(here: Path, report: Report) -> None:
    Path("mine.py").write_text(
        "from math import sqrt as root\nraise RuntimeError\ndef short(prompt, answer):\n    ...\n"
    )
    Path("runs/r").mkdir(parents=True)
    line = "rewards: [{model: runs/r}, {function: mine.py:short}, {function: mine.py:root}, {model: runs/later}]"
    assert report(recipe("grpo", line, rewards=False)) == []
    found = load_recipe("r.yaml").rewards
    assert [one.model or one.function for one in found] == [
        str(here / "runs/r"), f"{here}/mine.py:short", f"{here}/mine.py:root", "runs/later",
    ]  # fmt: skip
    Path("broken.py").write_text("def a(:\n")
    wrong = "rewards: [{function: mine.py:shart}, {function: mien.py:a}, {function: broken.py:a}, {model: mine.py}]"
    assert [
        text.partition(" broken.py cannot be read")[0] for text in report(recipe("grpo", wrong, rewards=False))
    ] == [
        "r.yaml:6:22: rewards.0.function: mine.py has no function 'shart' — did you mean 'short'?",
        "r.yaml:6:49: rewards.1.function: no such file 'mien.py:a' — did you mean 'mine.py:a'?",
        "r.yaml:6:72: rewards.2.function:",
        "r.yaml:6:94: rewards.3.model: 'mine.py' is a file, a reward model is a folder — name the run that trained it",
    ]
