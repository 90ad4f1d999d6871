"""A base's sizes without its weights and without the hub."""

from __future__ import annotations

import json

import pytest

from llama_ft.errors import UserError
from llama_ft.llama.shapes import PRESETS
from llama_ft.plan.shape import known_shape, vocabulary_of
from llama_ft.recipe.schema_model import Model


@pytest.mark.parametrize(
    ("base", "preset"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("preset:llama-2-7b", "llama-2-7b"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("huggyllama/llama-13b", "llama-1-13b"),
        ("codellama/CodeLlama-7b-Instruct-hf", "code-llama-7b"),
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-360m"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
    ],
)
def test_well_known_names(base, preset):
    assert known_shape(Model(base=base)).shape == PRESETS[preset]


def test_a_folder_says_it_itself(tiny_base):
    known = known_shape(Model(base=str(tiny_base)))
    config = json.loads((tiny_base / "config.json").read_text())
    assert known.shape.hidden == config["hidden_size"] and known.stored == "float32"
    assert vocabulary_of(str(tiny_base)) == 360


def test_weights_are_counted_as_the_model_has_them(tiny_base):
    from llama_ft.llama.load import load_config
    from llama_ft.llama.model import LlamaForCausalLM

    model = LlamaForCausalLM(load_config(tiny_base))
    assert known_shape(Model(base=str(tiny_base))).shape.parameters == sum(p.numel() for p in model.parameters())


def test_other_checkpoints_are_read_by_their_headers(real_data):
    shape = known_shape(Model(base=str(real_data / "checkpoints" / "aidreams260K.bin"))).shape
    assert (shape.hidden, shape.layers, shape.vocabulary) == (64, 4, 512)


def test_the_hubs_cache_comes_before_the_table(tiny_base, tmp_path, monkeypatch):
    commit = "a" * 40
    repository = tmp_path / "models--meta-llama--Llama-3.1-8B"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", "tokenizer.json"):
        (repository / "snapshots" / commit / name).write_bytes((tiny_base / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    known = known_shape(Model(base="meta-llama/Llama-3.1-8B"))
    assert known.shape.hidden == 64 and "hub's cache" in known.source
    assert vocabulary_of("meta-llama/Llama-3.1-8B") == 360


def test_an_unknown_base_says_what_to_do():
    with pytest.raises(UserError, match="preset") as caught:
        known_shape(Model(base="nobody/nothing"))
    assert "model.base" in str(caught.value)


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    with pytest.raises(UserError, match="cannot be read"):
        known_shape(Model(base=str(tmp_path)))
