"""What pairs, groups and best answers take: against the real layout of a batch, and the passes that go with them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from llama_ft.data.ends import lay_out
from llama_ft.llama.shapes import PRESETS
from llama_ft.plan.answers import cost, forward_passes, longest, work_of
from llama_ft.plan.engine import Engine
from llama_ft.plan.estimate import estimated
from llama_ft.plan.hardware import Hardware
from llama_ft.plan.plan import Plan, make_plan
from llama_ft.plan.shape import known_shape
from llama_ft.plan.steps import Cut, largest_pass, per_device, plan_steps
from llama_ft.plan.weights import Weights
from llama_ft.recipe import Recipe, load_recipe
from llama_ft.recipe.schema import Adapter
from tests.plan.conftest import RATES, facts

ONLINE = ("rewards=[{function: exact_match}]", "sampling.answers=4", "sampling.max_new_tokens=6")
POLICY = (*ONLINE, "training.global_batch=8")


def recipe(objective: str, *overrides: str, base: str = "quickstart") -> Recipe:
    online = {"grpo": POLICY, "rloo": POLICY, "rejection_sampling": ONLINE}.get(objective, ())
    return load_recipe(base, [f"training.objective={objective}", *online, *overrides])


def seen_by_attention(batch: dict) -> tuple[int, float]:
    """(tokens, twice the pairs of a query and a key that it sees, less the tokens: what stands for ℓ²)."""
    borders, shared = batch["cu_seqlens"].tolist(), batch["shared"].tolist()
    sizes = [end - start for start, end in pairwise(borders)]
    pairs = sum(
        n * (n + 1) // 2 + (n * sizes[prompt] if prompt >= 0 else 0) for n, prompt in zip(sizes, shared, strict=True)
    )
    return sum(sizes), 2 * pairs - sum(sizes)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize(("prompt", "end"), [(7, 4), (1, 9), (12, 1)])
def test_a_pair_takes_what_its_layout_holds(prompt: int, end: int, share: bool) -> None:
    batch = lay_out([(list(range(prompt)), [list(range(end)), list(range(5, 5 + end))])], share=share)
    found = cost(recipe("dpo", f"sequence.packing={str(share).lower()}"), prompt + 2 * end, 2 * end, pairs=True)
    assert (found.tokens, found.squares) == seen_by_attention(batch)
    assert found.labelled == batch["targets"].numel() == 2 * end


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
def test_a_group_takes_what_its_layout_holds(share: bool) -> None:
    said = recipe("grpo", f"sequence.packing={str(share).lower()}")
    batch = lay_out([(list(range(9)), [[1] * 6] * 4)], share=share)
    found = cost(said, 9 + 5, 5, pairs=False)  # a row with an answer of its own, which is taken off
    assert (found.tokens, found.squares) == seen_by_attention(batch)
    assert found.labelled == batch["targets"].numel()
    assert cost(said, 9 + 5, 5, pairs=True) == found


def test_other_objectives_take_one_answer() -> None:
    assert cost(recipe("sft"), 10, 4, pairs=False) == (10, 4, 100)
    assert cost(recipe("kto"), 10, 4, pairs=False) == (10, 4, 100)
    assert cost(recipe("sft"), 10, 4, pairs=True) == (8, 2, 64)  # the better one of a pair
    assert cost(recipe("reward"), 10, 4, pairs=True).labelled == 0  # no head over the vocabulary
    assert cost(recipe("rejection_sampling"), 10, 4, pairs=False) == (12, 6, 144)


def test_facts_of_pairs_are_those_of_their_layout() -> None:
    rows = replace(facts([30, 20, 40], [20, 10, 30]), pairs=True, evaluated=(50.0, 20.0, 1300.0), eval_documents=2)
    same = work_of(recipe("dpo"), rows)
    assert np.array_equal(same.lengths, rows.lengths) and same.exact and same.longest == 2 * 512
    assert same.evaluated[:2] == (50.0, 20.0)
    plain = work_of(recipe("dpo", "sequence.packing=false"), rows)
    assert plain.lengths.tolist() == [40, 30, 50] and plain.mean_tokens == 40
    assert (
        plan_steps(recipe("dpo"), plain, Cut(1, 2, 1)).seen.tokens
        > 1.2 * plan_steps(recipe("dpo"), same, Cut(1, 2, 1)).seen.tokens
    )
    by_hand = sum(p**2 + 2 * (2 * p * e + e**2) for p, e in ((10, 10), (10, 5), (10, 15)))
    assert plan_steps(recipe("dpo", "training.epochs=1"), same, Cut(1, 3, 1)).seen.squares == by_hand
    conversations = facts([30, 20])
    assert work_of(recipe("sft"), conversations) is conversations


def test_steps_of_a_policy_count_prompts() -> None:
    said = recipe("grpo", "training.global_batch=32", "training.epochs=1")
    assert per_device(said, 1) == 8 and per_device(said, 4) == 2
    with pytest.raises(Exception, match="into 3 equal parts of prompts with 4 answers each"):
        per_device(said, 3)
    work = work_of(said, facts([30] * 20, [10] * 20))
    steps = plan_steps(said, work, Cut(2, 4, 1))
    assert steps.total == 3 and steps.seen.tokens == 20 * (20 + 4 * 6) and steps.seen.labelled == 20 * 24
    assert not work.exact and any("upper bound" in note for note in work.notes)
    assert largest_pass(said, work, Cut(2, 4, 1)) == (2 * 44, 2 * 24)
    assert longest(said) == 512 + 24 and longest(recipe("rejection_sampling")) == 512 + 6


PASSES = {
    ("sft",): (0, 0), ("reward",): (0, 0), ("orpo",): (0, 0), ("simpo",): (0, 0), ("rejection_sampling",): (0, 0),
    ("dpo",): (1, 0), ("dpo", "preference.reference=copy"): (1, 0), ("dpo", "preference.reference=precomputed"): (0, 1),
    ("kto",): (3, 0), ("kto", "preference.reference=precomputed"): (1, 2),
    ("grpo",): (1, 0), ("grpo", "policy.kl=0"): (0, 0),
    ("rloo",): (2, 0), ("rloo", "policy.kl=0"): (0, 0),
}  # fmt: skip


@pytest.mark.parametrize(("said", "expected"), PASSES.items(), ids=map(" ".join, PASSES))
def test_further_forward_passes(said: tuple[str, ...], expected: tuple[int, int]) -> None:
    assert forward_passes(recipe(*said)) == expected


def planned(made: Recipe, rows: list[int], *, pairs: bool = True) -> Plan:
    hardware = Hardware("a CPU", 1, 16 * 2**30, None, on_gpu=False)
    known = replace(facts(rows), pairs=pairs)
    return make_plan(made, known_shape(made.model), known, hardware, Engine("", 1), rates=RATES)


def test_a_reference_costs_what_it_reads() -> None:
    rows = [60, 80, 100, 70]
    by = {
        name: planned(recipe("dpo", f"preference.reference={name}", "training.epochs=4"), rows)
        for name in ("adapter_off", "precomputed", "copy")
    }
    alone = planned(recipe("simpo", "training.epochs=4"), rows)
    assert by["precomputed"].seconds.training == pytest.approx(alone.seconds.training)
    assert by["copy"].seconds.training == pytest.approx(by["adapter_off"].seconds.training)
    added = by["adapter_off"].seconds.training - alone.seconds.training
    assert added == pytest.approx(4 * by["precomputed"].seconds.reference, rel=1e-3)  # four epochs, where it is once
    assert by["adapter_off"].seconds.reference == alone.seconds.reference == 0
    copied = by["copy"].memory
    assert copied.others == copied.weights and by["adapter_off"].memory.others == by["precomputed"].memory.others == 0
    assert any("once, before training" in note for note in by["precomputed"].work.notes)


def test_a_reward_model_has_a_score_in_place_of_a_head() -> None:
    shape = PRESETS["llama-2-7b"]
    full, lora = (Weights(shape, Adapter(method=method), reward=True) for method in ("full", "lora"))
    assert full.total == full.trained == shape.parameters - shape.vocabulary * shape.hidden + shape.hidden
    assert lora.trained == Weights(shape, Adapter()).trained + shape.hidden and not lora.whole
    made = planned(recipe("reward"), [60, 80])
    like = planned(recipe("simpo"), [60, 80])
    assert made.memory.head < 2**20 < like.memory.head
    assert made.seconds.training < like.seconds.training and made.seconds.samples == 0


def test_estimated_pairs_count_their_prompt_once() -> None:
    pairs = estimated(
        load_recipe("zephyr/llama-2-7b-dpo-full", ["data.0.use=hh-rlhf-harmless", "eval_data=null"]), "test"
    )
    better = estimated(load_recipe("llama-2-chat/smollm2-135m-1-sft", ["eval_data=null"]), "test")
    assert pairs.pairs and better.pairs
    assert pairs.mean_labelled == pytest.approx(2 * 47.7) and 110 < pairs.mean_tokens - pairs.mean_labelled < 130
    one = work_of(load_recipe("llama-2-chat/smollm2-135m-1-sft"), better)
    assert one.mean_labelled == pytest.approx(47.7, abs=1) and one.documents == 600
