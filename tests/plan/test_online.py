"""Sampling and scoring in a plan: answers drawn together, keys and values, reward models, seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ft.llama.shapes import PRESETS
from llama_ft.plan import online
from llama_ft.plan.choose import simplest
from llama_ft.plan.decode import decode
from llama_ft.plan.engine import Engine
from llama_ft.plan.hardware import Hardware
from llama_ft.plan.memory import Beside, memory
from llama_ft.plan.online import Drawing, beside, scorers
from llama_ft.plan.plan import Plan, make_plan
from llama_ft.plan.shape import known_shape
from llama_ft.plan.speed import cpu_speed
from llama_ft.plan.weights import Weights
from llama_ft.recipe import Recipe, load_recipe
from llama_ft.recipe.schema import Adapter
from tests.plan.conftest import RATES, card, case, facts

SMOL = PRESETS["smollm2-135m"]
CPU = Hardware("a CPU", 1, 16 * 2**30, None, on_gpu=False)
ROWS = facts([40] * 64, [10] * 64)


def recipe(objective: str, *overrides: str, rewards: str = "[{function: exact_match}]") -> Recipe:
    said = [f"training.objective={objective}", f"rewards={rewards}", "sampling.max_new_tokens=16", *overrides]
    return load_recipe("quickstart", [*said, "training.global_batch=32"])


def planned(made: Recipe) -> Plan:
    return make_plan(made, known_shape(made.model), ROWS, CPU, Engine("", 1), rates=RATES)


def test_constants_are_those_of_training() -> None:
    from llama_ft.train.online_run import ASKED
    from llama_ft.train.rejection import AT_ONCE

    assert (online.AT_ONCE, online.ASKED) == (AT_ONCE, ASKED)


def test_a_token_of_many_answers_costs_less_than_many_tokens_of_few() -> None:
    on = case(SMOL, on_gpu=False, dtype="float32")
    speed = cpu_speed(on, RATES, "float32")
    seconds = {rows: decode(on, speed, rows) for rows in (1, 5, 16, 64, 256)}
    assert list(seconds.values()) == sorted(seconds.values())
    each = [value / rows for rows, value in seconds.items()]
    assert each == sorted(each, reverse=True) and each[-1] < each[1] / 4
    assert seconds[256] == pytest.approx(2 * SMOL.parameters * 255 / speed.forward, rel=0.2)


def test_a_policy_draws_in_every_step_and_best_of_k_draws_once() -> None:
    policy, best = planned(recipe("grpo")), planned(recipe("rejection_sampling", "training.epochs=1"))
    assert policy.steps.total == 2 * 16 and best.steps.total == 2
    twice = planned(recipe("grpo", "training.epochs=4"))
    assert twice.seconds.sampling == pytest.approx(2 * policy.seconds.sampling)
    more = planned(recipe("rejection_sampling", "training.epochs=2"))
    assert more.seconds.sampling == best.seconds.sampling > 0
    assert planned(load_recipe("quickstart")).seconds.sampling == 0


def test_drawing_follows_its_parts() -> None:
    on = case(SMOL, on_gpu=False, dtype="float32")
    speed, made = cpu_speed(on, RATES, "float32"), recipe("grpo")
    drawing = Drawing(made, on, speed, ROWS, [])
    decoded = 16 * decode(on, speed, 32)
    assert drawing.of(4, 8) == pytest.approx(decoded, rel=0.25) and drawing.of(4, 8) > decoded
    assert drawing.of(0, 8) == 0.0
    judged = Drawing(made, on, speed, ROWS, scorers(recipe("grpo", rewards="[{model: runs/none}]"), on.weights))
    tokens = 4 * 30 + 32 * 16
    assert judged.of(4, 8) - drawing.of(4, 8) == pytest.approx(
        2 * SMOL.linear_weights * tokens / speed.forward, rel=0.05
    )


def test_reward_models_are_counted_by_their_own_sizes_where_they_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
        "intermediate_size": 128, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "num_key_value_heads": 4,
    }  # fmt: skip
    Path("runs/small/merged").mkdir(parents=True)
    Path("runs/small/merged/config.json").write_text(json.dumps(config))
    made = recipe("rloo", rewards="[{model: runs/small}, {model: small}, {model: runs/later}, {function: code}]")
    base = Weights(SMOL, Adapter())
    found = scorers(made, base)
    assert [one.known for one in found] == [True, True, False]
    assert found[0].weights.shape.hidden == 64 and found[2].weights.shape == SMOL
    plan = planned(made)
    assert plan.memory.others == 4 * sum(one.weights.total for one in found)
    assert [note for note in plan.work.notes if "not here yet" in note] == [
        "the reward model runs/later is not here yet: counted as large as the base"
    ]


def test_keys_and_values_count_where_they_are_more_than_a_step_takes() -> None:
    on = case(PRESETS["llama-2-7b"])
    made = recipe("grpo", "sampling.answers=4", "preference.reference=copy")
    found = beside(made, on, ROWS, [])
    per_token = 2 * 32 * 32 * 128 * 2
    cache = per_token * (8 * 30 + 32 * 16)
    assert cache < found.sampling < 1.1 * cache and found.frozen == on.weights.held(2) and not found.first
    parts = memory(replace(on, beside=Beside(7, 10**12)), 100, 50)
    freed = parts.gradients + parts.activations + parts.head
    assert parts.sampling == 10**12 - freed and parts.others == 7
    first = memory(replace(on, beside=Beside(7, 10**12, first=True)), 100, 50)
    assert first.sampling == 10**12 - freed - parts.optimizer  # answers are drawn before there are states
    assert memory(replace(on, beside=Beside(0, 1)), 100, 50).sampling == 0


@pytest.mark.parametrize("objective", ["reward", "rloo"])
def test_the_simplest_way_to_run_it_keeps_its_weights_whole(objective: str) -> None:
    made = load_recipe("llama-2-chat/4-rloo" if objective == "rloo" else "llama-2-chat/2-reward-helpful")
    known = known_shape(made.model)
    choice = simplest(made, known, replace(ROWS, pairs=True), card("H100-80GB", 8))
    assert choice is not None and choice.config in ("ddp", "zero1", "zero2")


def test_whole_plans_say_what_they_count(capsys: pytest.CaptureFixture[str]) -> None:
    from llama_ft.plan.commands import plan_recipe

    plan_recipe("llama-2-chat/4-rloo", [], hardware="8xH100")
    text = capsys.readouterr().out
    assert "512 answers = micro-batch" in text and "of prompts with 8 answers" in text
    assert "others" in text and "sampling" in text and "upper bound" in text
    assert text.count("is not here yet: counted as large as the base") == 2
