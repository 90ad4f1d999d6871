"""A finished run of objective reward on a tiny random LLaMA, and runs of the other objectives on answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedModel

from llama_ft.adapters.base import load_base
from llama_ft.adapters.lora import attach_lora
from llama_ft.data.prepare import Prepared, prepare_data
from llama_ft.files import write_json, write_text
from llama_ft.llama.load import DTYPES
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.run import Run
from llama_ft.train.adapter import save_adapter, save_full
from tests.tiny_run import QUESTIONS

PAIRS = [{"prompt": q, "chosen": a, "rejected": f"No hay, {i} stones."} for i, (q, a) in enumerate(QUESTIONS)]
RATED = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "label": bool(i % 2)}
    for i, (q, a) in enumerate(QUESTIONS)
]


def prepare_run(
    folder: Path, base: Path, objective: str, rows: list[dict[str, Any]], layout: str, **overrides: Any
) -> tuple[Run, Prepared]:
    """Recipe, rows (the last eight held out), lock; nothing trained yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:16]), ("held", rows[16:])):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    full = overrides.get("adapter__method") == "full"
    stated = {
        "name": "tiny",
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"method": "full"} if full else {"method": "lora", "r": 4, "alpha": 8},
        "data": [{"path": str(folder / "train.jsonl"), "layout": layout}],
        "eval_data": [{"path": str(folder / "held.jsonl"), "layout": layout}],
        "template": "chatml",
        "training": {"objective": objective},
        "output_dir": str(folder),
    }
    path = folder / "source.yaml"
    path.write_text(json.dumps(stated))  # JSON is YAML
    recipe = load_recipe(str(path), [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])
    path.unlink()
    prepared = prepare_data(recipe)
    run = Run(folder)
    write_text(run.recipe_file, dump(recipe))
    write_json(run.lock_file, {"base": recipe.model.base, "base_folder": str(base), "seed": 42})
    return run, prepared


def reward_run(folder: Path, base: Path, **overrides: Any) -> tuple[Run, PreTrainedModel | PeftModel, Prepared]:
    """A run that learnt a few steps which answers are better, with its adapter/ (or merged/), and its model."""
    run, prepared = prepare_run(folder, base, "reward", PAIRS, "preference", **overrides)
    recipe = run.recipe
    torch.manual_seed(1)
    model: Any = load_base(base, recipe, torch.float32, torch.device("cpu"))
    if recipe.adapter.method != "full":
        model = attach_lora(model, recipe.adapter)
    rank_a_little(model, prepared)
    if recipe.adapter.method == "full":
        save_full(model, prepared.tokenizer, run, DTYPES[recipe.export.dtype or recipe.model.dtype])
    else:
        save_adapter(model, prepared.tokenizer, run)
    return run, model, prepared


def rank_a_little(model: Any, prepared: Prepared, steps: int = 6) -> None:
    """A few steps of AdamW on −log σ(chosen − rejected): enough that every factor and the score move."""
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for step in range(steps):
        row = prepared.train[step]
        ids = [row["input_ids"], row["rejected_ids"]]
        bounds = torch.tensor([0, len(ids[0]), len(ids[0]) + len(ids[1])])
        tokens = torch.tensor([ids[0] + ids[1]])
        scores = model(input_ids=tokens, cu_seqlens=bounds, rows=bounds[1:] - 1).scores
        loss = -F.logsigmoid(scores[0] - scores[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
