"""A recipe of two small processes that trains in seconds, with everything it names in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny_run import QUESTIONS


def write_recipe(folder: Path, base: Path, **training: object) -> Path:
    """tiny.yaml, beside its rows, in a folder that all nodes see."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    settings = {"global_batch": 4, "micro_batch": 2, "max_steps": 400, "save_every": 1000, "learning_rate": 1e-3}
    recipe = {
        "name": "tiny",
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"method": "lora", "r": 4, "alpha": 8},
        "data": [{"path": "rows.jsonl", "layout": "messages"}],
        "template": "chatml",
        "sequence": {"max_length": 256},
        "training": settings | training,
        "export": {"merged": False},
        "tracking": [],
        "launch": "accelerate_configs/cpu_ddp_2.yaml",
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe, indent=2))  # JSON is YAML
    return path


@pytest.fixture
def here(tmp_path, tiny_base, monkeypatch) -> Path:
    """The recipe's folder, as working directory."""
    write_recipe(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    return tmp_path
