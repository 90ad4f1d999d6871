"""Every recipe for a machine without a GPU runs two steps through the real entry point; one is exported and proven."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llama_ft.data.cards import Hub, load_card
from llama_ft.recipe import load_recipe
from llama_ft.recipe.extends import shipped_recipes
from llama_ft.recipe.objectives import ONLINE
from tests.conftest import ROOT
from tests.train.conftest import ACCELERATE, ENVIRONMENT, metric

LAPTOP = [name for name in shipped_recipes() if load_recipe(name).launch.endswith("accelerate_configs/cpu.yaml")]
QUESTION, ANSWER = "How many alpacas stand on hill {n}?", "On hill {n} there stand {n} alpacas, and they look at you."


def rows(layout: str) -> list[dict]:
    """Forty rows of a card's layout, for the sets that lie on the hub."""
    pairs = [(QUESTION.format(n=n), ANSWER.format(n=n)) for n in range(40)]
    return {
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in pairs],
        "sharegpt": [
            {"id": str(n), "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for n, (q, a) in enumerate(pairs)
        ],
        "messages": [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs
        ],
        "preference": [
            {"prompt": q, "chosen": a, "rejected": f"No alpaca on hill {n}."} for n, (q, a) in enumerate(pairs)
        ],
        "rated": [{"prompt": q, "completion": a, "label": bool(n % 2)} for n, (q, a) in enumerate(pairs)],
    }[layout]


def test_there_are_such_recipes():
    assert {"quickstart", "alpaca/smollm2-135m-lora", "alpaca/smollm2-135m-qlora", "alpaca/smollm2-135m-dora"} <= set(
        LAPTOP
    )
    assert {"alpaca/smollm2-135m-full", "guanaco/smollm2-135m-qlora", "vicuna/smollm2-135m-lora"} <= set(LAPTOP)


@pytest.mark.parametrize("name", LAPTOP)
def test_two_steps(small_base, tmp_path, name):
    recipe = load_recipe(name)
    changes = [f"model.base={small_base}", "training.max_steps=2", "training.global_batch=4", "data.0.limit=40"]
    card = load_card(recipe.data[0].use)
    if isinstance(card.source, Hub):
        path = Path(tmp_path, "rows.json")
        path.write_text(json.dumps(rows(card.layout)))
        changes.append(f"data.0.path={path}")
    if isinstance(recipe.eval_data, list):
        changes.append("eval_data={holdout: 0.2}" if isinstance(card.source, Hub) else "eval_data.0.limit=8")
    if recipe.training.objective in ONLINE:
        changes += ["sampling={answers: 2, max_new_tokens: 8}", "training.warmup=0"]
        # No two layers solve a sum, and the reward model is the run of the step before.
        Path(tmp_path, "worth.py").write_text("def worth(prompt, answer, reference):\n    return len(answer)\n")
        changes.append(f"rewards=[{{function: '{tmp_path / 'worth.py'}:worth'}}]")
    if recipe.training.objective == "pretrain":  # its batch counts tokens, in packs of max_length
        warmup = "training.warmup=0" if recipe.training.warmup_tokens is None else "training.warmup_tokens=512"
        changes += ["sequence.max_length=128", "training.global_batch=512", warmup]
        changes.append("data.0.limit=4" if recipe.infilling is None else "data.1.limit=8")
    if name != "quickstart":
        changes.append("export.merged=false")
    line = [*ACCELERATE, "--config_file", recipe.launch, "-m", "llama_ft.train", name, *changes]
    done = subprocess.run(
        [*line, f"output_dir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(metric(tmp_path / "run")) == 2
    if name == "quickstart":  # the proofs of every method are tests/train/test_methods.py's
        assert json.loads((tmp_path / "run" / "export.json").read_text())["ok"] is True
