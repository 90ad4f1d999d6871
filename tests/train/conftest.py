"""A real model cut short, and runs of the real command on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
"""`accelerate launch` without accelerate's other commands, whose imports cost a second a run: accelerate-launch."""
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def small_base(smollm2, tmp_path_factory) -> Path:
    """SmolLM2-135M cut to its first two layers, with its tokenizer: real weights, a second a step."""
    return cut_short(smollm2, tmp_path_factory.mktemp("base"))


def cut_short(source: Path, folder: Path, layers: int = 2) -> Path:
    """A LLaMA's first layers, in float32, with its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def overrides(small_base, tmp_path) -> list[str]:
    """The quickstart recipe, made small."""
    return [
        f"model.base={small_base}",
        "data.0.limit=48",
        "eval_data=null",
        "training.global_batch=8",
        "training.max_steps=6",
        "training.save_every=2",
        f"output_dir={tmp_path / 'run'}",
    ]


def train_here(overrides: list[str], **flags):
    """Trains in this process; returns the run."""
    from llama_ft import load_recipe, train_recipe

    return train_recipe(load_recipe("quickstart", overrides), **flags)


def command(overrides: list[str], *flags: str) -> list[str]:
    """The main door."""
    return [*ACCELERATE, "-m", "llama_ft.train", "quickstart", *overrides, *flags]


def run_command(overrides: list[str], *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(overrides, *flags), capture_output=True, text=True, env=ENVIRONMENT)


def metric(folder: Path, key: str = "loss") -> list[float]:
    """One value per step of metrics.jsonl."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]
