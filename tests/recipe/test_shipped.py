"""Every shipped recipe and launch config, by the programs that will read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.paths import shipped_root
from llama_ft.recipe import load_recipe, resolve
from llama_ft.recipe.extends import shipped_recipes
from llama_ft.recipe.launchers import Launcher, read_launcher

LAUNCH_CONFIGS = sorted((shipped_root() / "accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_needs(name: str) -> None:
    resolved = resolve(name)
    assert "Needs" in resolved.files[0].read_text(encoding="utf-8").splitlines()[0]
    if resolved.recipe.reproduces:
        assert resolved.recipe.reproduces.deviations


def test_the_first_recipes_are_shipped() -> None:
    assert {"quickstart", "alpaca/smollm2-135m-lora", "alpaca/llama-7b-full"} <= set(shipped_recipes())


def test_alpaca_7b_has_the_originals_hyper_parameters() -> None:
    """stanford_alpaca's README and train.py: 4 GPUs x 4 documents x 8 accumulated."""
    recipe = load_recipe("alpaca/llama-7b-full")
    training = recipe.training
    assert (training.learning_rate, training.epochs, training.global_batch) == (2e-5, 3, 128)
    assert (training.schedule, training.warmup, training.weight_decay, training.max_grad_norm) == (
        "cosine",
        0.03,
        0,
        1.0,
    )
    assert (recipe.sequence.max_length, recipe.sequence.train_on) == (512, "responses")
    assert (recipe.model.dtype, recipe.adapter.method, recipe.template) == ("bfloat16", "full", "alpaca")


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.stem)
def test_launch_configs_are_read_by_accelerate(path: Path) -> None:
    """By its own loader, which refuses unknown keys; keys of fsdp_config must be options of `accelerate launch`."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    options = set(vars(launch_command_parser().parse_args(["script.py"])))
    assert set(config.fsdp_config or {}) <= options
    ours = read_launcher(path)
    assert isinstance(ours, Launcher)
    assert (ours.use_cpu, ours.processes) == (config.use_cpu, config.num_processes)
    head = path.read_text(encoding="utf-8").splitlines()
    assert head[0].startswith("# Needs:")
    assert any(line.startswith("# Saves:") for line in head)
    assert any(line.startswith("# Choose:") for line in head)


def test_hardware_in_words() -> None:
    words = {path.stem: read_launcher(path).hardware for path in LAUNCH_CONFIGS}  # type: ignore[union-attr]
    assert words["cpu"] == "CPU"
    assert words["ddp"] == "2 GPUs, DDP"
    assert words["fsdp2"] == "4 GPUs, FSDP2"
    assert Launcher(False, 1, "").hardware == "1 GPU"
    assert Launcher(True, 2, "ZeRO-2").hardware == "2 CPU, ZeRO-2"
