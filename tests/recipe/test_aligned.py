"""The recipes of alignment: the papers' numbers, a chain of steps that fit together, and sums that can be checked."""

from __future__ import annotations

import json
import re

from llama_ft.data.cards import load_card
from llama_ft.recipe import load_recipe, resolve
from llama_ft.recipe.extends import shipped_recipes


def test_llama_2_chat_has_the_papers_numbers() -> None:
    """AdamW of the base model, 10 % of the peak for reward models; PPO's KL and whitening for RLOO."""
    for name in (name for name in shipped_recipes() if name.startswith("llama-2-chat/") and "smollm2" not in name):
        training = load_recipe(name).training
        assert (training.betas, training.eps, training.weight_decay) == ([0.9, 0.95], 1e-5, 0.1)
        assert training.max_grad_norm == 1.0 and training.final_rate == (0.1 if "reward" in name else 0)
    safety = load_recipe("llama-2-chat/2-reward-safety").data
    assert safety[1].limit == round((load_card("hh-rlhf-harmless").rows or {})["train"] / 9)  # one in ten is helpful
    rloo, best = load_recipe("llama-2-chat/4-rloo"), load_recipe("llama-2-chat/3-rejection-sampling")
    assert (rloo.policy.kl, rloo.policy.whiten, rloo.training.max_steps) == (0.01, True, 400)
    assert best.sampling.answers == 10 and [one.weight for one in best.rewards] == [0.5, 0.5]
    assert rloo.rewards == best.rewards


def test_the_chain_of_a_laptop_names_the_runs_before_it() -> None:
    steps = [f"llama-2-chat/smollm2-135m-{step}" for step in ("1-sft", "2-reward", "3-rejection-sampling", "4-rloo")]
    sft, reward, best, rloo = map(load_recipe, steps)
    assert [one.training.objective for one in (sft, reward, best, rloo)] == [
        "sft",
        "reward",
        "rejection_sampling",
        "rloo",
    ]
    assert {one.rewards[0].model for one in (best, rloo)} == {f"{reward.run_dir}/merged"}
    heads = {step: resolve(step).files[0].read_text(encoding="utf-8") for step in steps}
    assert (
        f"model.base={sft.run_dir}/merged" in heads[steps[1]] and f"model.base={sft.run_dir}/merged" in heads[steps[2]]
    )
    assert f"model.base={best.run_dir}/merged" in heads[steps[3]]


def test_losses_are_the_originals() -> None:
    zephyr = [load_recipe(f"zephyr/llama-2-7b-dpo-{method}").preference for method in ("full", "qlora")]
    assert {(one.loss, one.beta, one.length_normalised) for one in zephyr} == {("sigmoid", 0.01, False)}
    tulu = load_recipe("tulu/llama-3.1-8b-dpo").preference
    assert (tulu.beta, tulu.length_normalised) == (5.0, True)


def test_small_sums_can_be_checked_and_none_is_in_both_splits() -> None:
    card = load_card("small-sums")
    asked: dict[str, set[tuple[str, ...]]] = {}
    for split, count in (card.rows or {}).items():
        rows = [json.loads(line)["messages"] for line in card.file(split).read_text(encoding="utf-8").splitlines()]
        assert len(rows) == count and len({question["content"] for question, _ in rows}) == count
        asked[split] = set()
        for question, answer in rows:
            a, sign, b, equals, result = answer["content"].split()
            assert equals == "=" and int(result) == {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](
                int(a), int(b)
            )
            assert set(re.findall(r"\d+", question["content"])) == {a, b}
            asked[split].add((sign, a, b) if sign == "-" else (sign, *sorted((a, b))))
    assert len(asked["heldout"]) > 40 and not asked["heldout"] & asked["train"]
    form = load_recipe("grpo/smollm2-135m-sums").rewards[1].pattern
    assert form is not None and re.fullmatch(form, "3 + 4 = 7") and not re.fullmatch(form, "it is 7")
