"""The simplest launch config that fits, and the tables of docs/scaling.md that are made of it."""

from __future__ import annotations

import json

import pytest

from benchmarks.scaling_table import CARDS, METHODS, MODELS, by_engine, chosen, line_of, table
from llama_ft.llama.shapes import PRESETS
from llama_ft.paths import find_file
from llama_ft.plan.choose import MANY, ONE, main_memory
from llama_ft.plan.commands import plan_recipe
from llama_ft.plan.engine import Engine
from llama_ft.plan.launch_line import engine_of
from llama_ft.recipe.launchers import read_launcher
from tests.conftest import ROOT
from tests.plan.conftest import case

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("method", METHODS)
def test_the_page_holds_what_the_command_prints(method):
    assert table(method) in PAGE


def test_the_page_holds_the_exchange_by_engine():
    assert by_engine() in PAGE


@pytest.mark.parametrize(
    ("model", "method", "cards"),
    [
        ("Llama 3.1 70B", "lora", "8xH100-80GB"),
        ("Llama 3.1 8B", "qlora", "RTX-4090"),
        ("Llama 2 13B", "full", "2xRTX-4090"),
        ("Llama 3.1 8B", "full", "64xH100-80GB"),
    ],
)
def test_a_line_is_what_plan_says(model, method, cards, capsys):
    """And the config before it does not fit, or fits only where its weights do not travel."""
    choice = chosen(model, method, cards)
    recipe, *changed = line_of(model, method, cards, choice)[:-2]
    plan_recipe(recipe, changed, hardware=cards, as_json_text=True)
    told = json.loads(capsys.readouterr().out)
    assert told["memory"]["peak"] == choice.plan.peak < told["hardware"]["usable"]
    assert told["batch"]["largest_micro"] == choice.plan.fit.largest
    assert told["exchange"] == {"reduced": choice.plan.exchange.reduced, "gathered": choice.plan.exchange.gathered,
                                "host": choice.plan.exchange.host, "sent": choice.plan.exchange.sent}  # fmt: skip
    order = ONE if cards == "RTX-4090" else MANY
    for simpler in order[: order.index(choice.config)]:
        for again in ("false", "true"):
            own = [key for key in changed if not key.startswith(("launch=", "training.gradient_checkpointing="))]
            own += [f"launch=accelerate_configs/{simpler}.yaml", f"training.gradient_checkpointing={again}"]
            plan_recipe(recipe, own, hardware=cards, as_json_text=True)
            assert json.loads(capsys.readouterr().out)["batch"]["largest_micro"] == 0


def test_more_memory_never_needs_a_less_simple_config():
    for model in MODELS:
        for method in METHODS:
            found = [chosen(model, method, cards) for cards in ("2xRTX-4090", "8xA100-80GB")]
            places = [MANY.index(one.config) if one is not None else len(MANY) for one in found]
            assert places[0] >= places[1], (model, method)
    assert len(set(CARDS)) == len(CARDS)


def test_qlora_is_never_cut_up():
    assert chosen("Llama 3.1 70B", "qlora", "2xRTX-4090") is None
    assert chosen("Llama 3.1 70B", "qlora", "8xA100-80GB").config == "ddp"


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ("zero1", Engine("ZeRO-1", 8)),
        ("zero2", Engine("ZeRO-2", 8)),
        ("zero3", Engine("ZeRO-3", 8)),
        ("zero3_offload", Engine("ZeRO-3", 8, offload=True)),
        ("fsdp2", Engine("FSDP2", 8)),
        ("fsdp2_offload", Engine("FSDP2", 8, offload=True)),
    ],
)
def test_launch_configs_are_planned_as_their_engine(config, engine):
    path = find_file(f"accelerate_configs/{config}.yaml")
    assert engine_of(str(path), read_launcher(path), 8) == engine


def test_main_memory_of_offloading():
    """Bytes per trained weight as the launch configs say: 16 under FSDP2, 18 under ZeRO-3, 12 for states alone."""
    eight = PRESETS["llama-3.1-8b"]
    each = {
        name: main_memory(case(eight, adapter__method="full", engine=Engine(name, 2, offload=True))) / eight.parameters
        for name in ("FSDP2", "ZeRO-3", "ZeRO-2")
    }
    assert each == {"FSDP2": 16, "ZeRO-3": 18, "ZeRO-2": 12}
    assert main_memory(case(eight, engine=Engine("FSDP2", 2))) == 0
    frozen = main_memory(case(eight, engine=Engine("FSDP2", 2, offload=True)))
    assert frozen == 2 * eight.parameters + 16 * 41_943_040
