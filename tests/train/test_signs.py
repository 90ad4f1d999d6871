"""Signs of a policy that goes astray: each where it is there, none on runs that are well, short or noisy."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from llama_ft.train.signs import Heard, Signs, collapsed, kl_runaway, length_drift, repeated_text, repeats, rises


def line(start: float, end: float, steps: int, noise: float = 0.0, seed: int = 0) -> list[float]:
    """From start to end, evenly, with noise."""
    draw = random.Random(seed)
    return [start + (end - start) * i / max(1, steps - 1) + draw.gauss(0, noise) for i in range(steps)]


def test_kl_that_stays_near_is_not_told():
    for seed in range(50):
        assert kl_runaway(line(0.001, 0.3, 100, 0.02, seed)) is None, "GRPO's usual distance"
        assert kl_runaway(line(0.2, 1.2, 100, 0.05, seed)) is None, "six times as far, not ten"
    assert kl_runaway([]) is None
    assert kl_runaway([5.0] * 4, max_kl=1.0) is None, "too few steps"
    assert kl_runaway([0.01] * 10 + [3.0] * 9) is None, "too few steps without a limit"


def test_kl_that_runs_away_is_told():
    said = kl_runaway([0.01] * 10 + line(0.1, 2.0, 20))
    assert said is not None and "1.8 nats per token, 0.01 at first" in said
    limited = kl_runaway([0.1, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3], max_kl=0.25)
    assert limited is not None and "above policy.max_kl 0.25" in limited
    assert kl_runaway([0.1] * 30, max_kl=0.25) is None
    one = kl_runaway([0.1] * 9 + [0.9], max_kl=0.25)
    assert one is not None, "0.26 in the mean of five"
    assert "no number" in (kl_runaway([0.1] * 20 + [math.nan]) or "")


def test_length_drift_takes_both_length_and_reward():
    longer, shorter, same = line(50, 150, 40, 3), line(150, 40, 40, 3), line(50, 60, 40, 3)
    up, level = line(0.2, 0.6, 40, 0.02), line(0.4, 0.4, 40, 0.02)
    assert "it may be length that is rewarded" in (length_drift(longer, up) or "")
    assert "it may be brevity that is rewarded" in (length_drift(shorter, up) or "")
    assert length_drift(longer, level) is None
    assert length_drift(same, up) is None
    assert length_drift(longer, line(0.6, 0.2, 40, 0.02)) is None, "reward falls"
    assert length_drift(line(50, 500, 19), line(0, 1, 19)) is None, "too short"
    wolves = [length_drift(longer, line(0.4, 0.4, 40, 0.1, seed)) for seed in range(100)]
    assert sum(map(bool, wolves)) <= 2, "noise of rewards is no rise"


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (list(range(100)), False),
        ([7] * 100, True),
        (list(range(60)) + [7] * 8, True),  # a token eight times at the end
        (list(range(60)) + [7] * 7, False),
        (list(range(60)) + [1, 2, 3] * 8, True),
        (list(range(60)) + [1, 2, 3] * 7 + [1, 2], False),
        (list(range(30)) * 3, True),  # a third of its 4-grams are different
        (list(range(30)) + list(range(200, 260)), False),
        ([7] * 19, False),  # too short to say
    ],
)
def test_an_answer_that_says_the_same_over_and_over(ids, expected):
    assert repeats(ids) is expected


def test_real_text_does_not_repeat(smollm2):
    """A list, a table and a proof by cases use the same words, and are no loops."""
    from transformers import AutoTokenizer

    count = AutoTokenizer.from_pretrained(smollm2)
    rows = "\n".join(f"| {n} | {n * 7 % 11} bales | hill {n * 3 % 5} |" for n in range(12))
    proof = " ".join(
        f"If n is {n} then n * n is {n * n}, which is {'even' if n % 2 == 0 else 'odd'}." for n in range(9)
    )
    for text in (rows, proof, str(test_real_text_does_not_repeat.__doc__)):
        assert not repeats(count(text).input_ids)
    assert repeats(count("I eat hay. " * 30).input_ids)


def test_repeated_text_must_be_frequent_and_rise():
    said = repeated_text(line(0.02, 0.4, 40, 0.01))
    assert said is not None and "of the answers say the same over and over" in said
    assert repeated_text(line(0.4, 0.4, 40, 0.03)) is None, "it was so from the start"
    assert repeated_text(line(0.0, 0.15, 40, 0.01)) is None, "rare"
    assert repeated_text([0.0] * 9 + [1.0] * 10) is None, "too short"


def step(flat: float, equal: float = 0.0, groups: int = 8, reward: float = 0.5) -> Heard:
    return Heard(reward, 50.0, 0.0, flat, equal, groups)


def test_collapsed_groups():
    assert "too hard for this model, or solved (mean reward 0.5)" in (collapsed([step(0.95)] * 10) or "")
    assert "they are the same answers" in (collapsed([step(1.0, 0.95)] * 10) or "")
    assert collapsed([step(0.875)] * 10) is None
    assert collapsed([step(1.0)] * 9) is None, "too few steps"
    assert collapsed([step(1.0, groups=1)] * 10) is None, "too few groups"
    assert collapsed([step(1.0)] * 40 + [step(0.2)] * 10) is None, "it was so, and is not any more"


def test_a_rise_needs_more_than_noise():
    assert rises(line(0, 1, 20))
    assert not rises([0.5] * 20)
    assert sum(rises(line(0.5, 0.5, 40, 0.2, seed)) for seed in range(200)) <= 3


def answer(ids: list[int], total: float) -> SimpleNamespace:
    return SimpleNamespace(ids=ids, scored=SimpleNamespace(total=total))


def test_the_signs_of_a_run_are_told_by_name():
    """Short varied answers at first; then all the same, long, looping, and worth more."""
    said: dict[str, str] = {}
    recipe = SimpleNamespace(policy=SimpleNamespace(max_kl=None))
    signs = Signs(recipe, said.setdefault)
    draw = random.Random(0)
    for number in range(10):
        groups = [[answer(draw.sample(range(100), 20), draw.random()) for _ in range(4)] for _ in range(3)]
        figures = signs.heard(number, groups)
        signs.moved(0.01)
    assert said == {}
    assert figures["groups"] == 3
    assert figures["answer_median"] == 20
    assert figures["flat_groups"] == figures["equal_groups"] == figures["repeated_text"] == 0
    for number in range(10, 20):
        figures = signs.heard(number, [[answer([5, 6] * 40, 2.0)] * 4] * 3)
        signs.moved(1.5)
    assert figures["flat_groups"] == figures["equal_groups"] == figures["repeated_text"] == 1
    assert sorted(said) == ["collapsed-groups", "kl-runaway", "length-drift", "repeated-text"]
    assert signs.heard(20, []) == {}


def test_a_run_that_goes_on_remembers_its_start():
    said: dict[str, str] = {}
    recipe = SimpleNamespace(policy=SimpleNamespace(max_kl=None))
    first = Signs(recipe, said.setdefault)
    draw = random.Random(0)
    records = [{"eval_loss": 1.0}]
    for number in range(10):
        figures = first.heard(number, [[answer(draw.sample(range(100), 20), draw.random()) for _ in range(4)]])
        records.append({"loss": 0.1, "kl": 0.01, "reward": first.steps[-1].reward, **figures})
    again = Signs(recipe, said.setdefault, records)
    assert again.steps == first.steps
    for number in range(10, 20):
        again.heard(number, [[answer(draw.sample(range(1000), 60), 2.0 + draw.random()) for _ in range(4)]])
        again.moved(1.0)
    assert sorted(said) == ["kl-runaway", "length-drift"]
