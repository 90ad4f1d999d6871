"""Whole plans: every shipped recipe, the command's output, what is exact, and that no torch is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llama_ft.errors import UserError
from llama_ft.plan.commands import plan_recipe
from llama_ft.plan.curve import curve, points
from llama_ft.plan.data import data_facts
from llama_ft.plan.engine import Engine
from llama_ft.plan.estimate import template_tokens
from llama_ft.plan.hardware import Hardware
from llama_ft.plan.plan import make_plan
from llama_ft.plan.shape import known_shape
from llama_ft.recipe import load_recipe
from llama_ft.recipe.extends import shipped_recipes
from llama_ft.recipe.schema import Training
from tests.plan.conftest import card

KEYS = {
    "version", "recipe", "base", "data", "steps", "batch", "learning_rate", "hardware", "memory", "alternatives",
    "exchange", "flops_per_token", "seconds", "rate", "disk", "cost", "launch",
}  # fmt: skip


def printed(capsys, recipe: str, *overrides: str, **keys) -> str:
    plan_recipe(recipe, list(overrides), **keys)
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", sorted(shipped_recipes()))
def test_every_shipped_recipe_plans(recipe, capsys):
    told = json.loads(printed(capsys, recipe, hardware="H100", as_json_text=True, price=2.5))
    assert set(told) == KEYS and told["version"] == 1
    assert told["memory"]["peak"] > told["memory"]["weights"] > 0
    assert told["batch"]["micro"] * told["batch"]["accumulation"] * told["batch"]["devices"] > 0
    assert told["launch"].startswith("accelerate launch ") and told["launch"].endswith(f"llama_ft.train {recipe}")
    if told["steps"]["total"] is not None:
        assert told["cost"] == pytest.approx(2.5 * told["seconds"]["total"] / 3600)
        assert told["learning_rate"][0][0] == 1


def test_lines_say_exact_or_estimated(capsys):
    text = printed(capsys, "alpaca/llama-7b-full", hardware="8xA100-80", price=1.5)
    assert "52,002 documents" in text and "(estimated)" in text and "FSDP2" in text
    assert "--num_processes 8" in text and "price" in text and "\x1b" not in text
    assert "exact" not in text


def test_a_recipe_for_a_cpu_planned_for_gpus_names_another_launch_config(capsys):
    text = printed(capsys, "quickstart", hardware="2x4090")
    assert "accelerate_configs/ddp.yaml -m llama_ft.train quickstart" in text
    four = printed(capsys, "quickstart", hardware="4x4090")
    assert "accelerate_configs/ddp.yaml --num_processes 4 -m" in four


def test_what_does_not_fit_is_said_with_what_would(capsys):
    text = printed(capsys, "alpaca/llama-7b-full", hardware="2x4090")
    assert "does not fit" in text and "NOTHING FITS" in text and "fits: ZeRO-3 offload" in text


def test_memory_alone_gives_no_time(capsys):
    text = printed(capsys, "guanaco/llama-7b-qlora", hardware="24GiB")
    assert "not known: no rate is known" in text and "largest that fits is" in text


def test_unknown_steps_are_said(capsys):
    text = printed(capsys, "quickstart", "data=[{use: gpteacher}]", hardware="4090")
    assert "nothing says how many rows there are" in text
    bounded = printed(capsys, "quickstart", "data=[{use: gpteacher}]", "training.max_steps=50", hardware="4090")
    assert "steps     50" in bounded and "upper bound" in bounded


def test_counted_figures_are_what_training_prepares(smollm2, capsys, real_data):
    from llama_ft.data.prepare import prepare_data

    overrides = [f"data.0.path={real_data / 'instruct' / 'alpaca_5000.json'}", "data.0.limit=300", "training.epochs=2"]
    recipe = load_recipe("alpaca/smollm2-135m-lora", [*overrides, f"model.base={smollm2}"])
    facts = data_facts(recipe)
    prepared = prepare_data(recipe)
    assert facts.exact and facts.documents == len(prepared.train) and facts.vocabulary == len(prepared.tokenizer)
    plan = make_plan(recipe, known_shape(recipe.model), facts, card("RTX-4090"), Engine("", 1))
    assert plan.steps.seen.tokens == 2 * int(prepared.lengths.sum())
    assert plan.steps.seen.labelled == 2 * sum(prepared.train["labelled"])
    assert facts.evaluated[0] == sum(prepared.eval["length"])


def test_estimates_are_near_what_is_counted(smollm2, real_data):
    """Alpaca's card against 300 of its rows: prompt and answer of a paper's table, and the template around them."""
    from llama_ft.plan.estimate import estimated

    path = real_data / "instruct" / "alpaca_5000.json"
    overrides = [f"model.base={smollm2}", f"data.0.path={path}", "data.0.limit=1500"]
    counted = data_facts(load_recipe("alpaca/smollm2-135m-lora", overrides))
    guessed = estimated(load_recipe("alpaca/smollm2-135m-lora"), "test")
    assert guessed.documents == 52002 - 1040 and not guessed.exact
    assert guessed.mean_tokens == pytest.approx(counted.mean_tokens, rel=0.15)
    assert guessed.mean_labelled == pytest.approx(counted.mean_labelled, rel=0.15)


def test_a_templates_own_tokens():
    assert template_tokens("plain") < template_tokens("chatml") < template_tokens("alpaca") < 60


def test_tokens_that_a_base_lacks_are_trained():
    rows = "data=[{use: codeparrot-clean}]"  # shares of tokens are pretrain's alone
    recipe = load_recipe("code-llama/llama-2-7b-infilling", ["adapter.method=lora", "training.objective=sft", rows])
    plan = make_plan(recipe, known_shape(recipe.model), data_facts(recipe), card("A100-80GB"), Engine("", 1))
    assert plan.case.weights.shape.vocabulary == 32_016
    assert plan.case.weights.trained == 39_976_960 + 2 * 32_016 * 4096


def test_a_cpus_plan_counts_the_process(rates):
    recipe = load_recipe("alpaca/smollm2-135m-lora")
    hardware = Hardware("a CPU", 1, 16 * 2**30, None, on_gpu=False)
    known = known_shape(recipe.model)
    plan = make_plan(recipe, known, data_facts(recipe), hardware, Engine("", 1), rates=rates)
    assert plan.dtype == "float32" and plan.peak == plan.host.export > plan.host.training > 10**9
    assert plan.seconds.total > plan.seconds.training > 0
    without = load_recipe("alpaca/smollm2-135m-lora", ["export.merged=false"])
    lean = make_plan(without, known, data_facts(without), hardware, Engine("", 1), rates=rates)
    assert lean.peak == plan.host.training and lean.seconds.export == 0


def test_planning_imports_no_torch():
    """The rows and the tokenizer lie on the hub: nothing of torch, transformers' models or datasets is needed."""
    code = (
        "import sys; from llama_ft.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "loaded = {'torch', 'datasets', 'peft', 'trl'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    for arguments in (["guanaco/llama-7b-qlora", "--hardware", "4090"], ["alpaca/llama-7b-full", "--sweep"]):
        done = subprocess.run([sys.executable, "-c", code, "plan", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_sweep(capsys):
    cells = json.loads(
        printed(capsys, "guanaco/llama-7b-qlora", "training.micro_batch=auto", sweeping=True, as_json_text=True)
    )
    by = {(cell["card"], cell["method"]): cell for cell in cells}
    assert len(cells) == 44
    assert by["RTX-4090", "full"]["micro_batch"] == 0 and by["RTX-4090", "qlora 4"]["micro_batch"] > 0
    assert by["H100-80GB", "full"]["micro_batch"] == 0 < by["B200-180GB", "full"]["micro_batch"]
    assert by["H100-80GB", "lora"]["needed"] < 0.95 * 81_559 * 2**20 < by["H100-80GB", "full"]["needed"]
    rates = [by[name, "qlora 4"]["tokens_per_second"] for name in ("L4-24GB", "A100-80GB", "H100-80GB")]
    assert rates == sorted(rates)
    text = printed(capsys, "guanaco/llama-7b-qlora", sweeping=True)
    assert text.splitlines()[0].split() == [
        "card",
        "method",
        "fits",
        "micro-batch",
        "checkpointing",
        "memory",
        "tokens/s",
        "time",
    ]


def test_the_curve():
    training = Training(learning_rate=2e-4, warmup=10, schedule="linear")
    assert points(training, 100) == [
        (1, 0.0),
        (11, 2e-4),
        (51, pytest.approx(2e-4 * 50 / 90)),
        (100, pytest.approx(2e-4 / 90)),
    ]
    drawn = curve(training, 100)
    assert len(drawn) == 48 and drawn[5] == "█" and drawn[-1] == "▁"
    assert curve(Training(warmup=0, schedule="constant"), 3) == "███"


def test_mistakes_are_said(capsys):
    with pytest.raises(UserError, match="no such hardware"):
        plan_recipe("quickstart", [], hardware="H1OO")
    with pytest.raises(UserError, match="not negative"):
        plan_recipe("quickstart", [], price=-1.0)
    with pytest.raises(UserError, match="cannot be split into 7 equal parts"):
        plan_recipe("alpaca/llama-7b-full", [], hardware="7xH100")


def test_processes_of_a_cpu_share_its_memory_and_its_rate(monkeypatch, capsys, rates):
    from llama_ft.plan import plan as planning

    monkeypatch.setattr(planning, "rates_here", lambda *_: rates)
    changes = ("training.global_batch=16", "training.micro_batch=4", "training.max_steps=4", "export.merged=false")
    one, two = (
        json.loads(printed(capsys, "quickstart", *changes, f"launch=accelerate_configs/{name}.yaml", as_json_text=True))
        for name in ("cpu", "cpu_ddp_2")
    )
    assert two["hardware"]["devices"] == 2 and two["hardware"]["memory"] < 0.7 * one["hardware"]["memory"]
    assert (two["batch"]["accumulation"], one["batch"]["accumulation"]) == (2, 4)
    assert two["seconds"]["training"] == pytest.approx(one["seconds"]["training"], rel=0.1)
    assert two["exchange"]["sent"] == 4 * two["base"]["trained"] and one["exchange"]["sent"] == 0
