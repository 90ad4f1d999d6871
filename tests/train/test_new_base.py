"""Runs that start from new weights: through the real trainer, exported, proven, resumed and opened by others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from llama_ft import load_recipe, train_recipe
from llama_ft.data.prepare import prepare_data
from llama_ft.errors import MachineFault, UserError
from llama_ft.export.run import export_run
from llama_ft.llama.init import initial_weights
from llama_ft.llama.load import build_random, load_model
from llama_ft.llama.shapes import PRESETS
from llama_ft.recipe.run import Run
from llama_ft.serve.source import open_source
from llama_ft.train import checks
from llama_ft.train.base import open_base
from llama_ft.train.machine import token_flops
from llama_ft.train.planned import plan_of_run
from tests.train.conftest import metric


def recipe(folder: Path, tokenizer: Path, **changes: str):
    """The quickstart from a new `tiny`: four steps of eight documents, in float32."""
    settings = {
        "model.base": "preset:tiny",
        "model.tokenizer": str(tokenizer),
        "model.dtype": "float32",
        "data.0.limit": "24",
        "eval_data": "null",
        "sequence.max_length": "384",
        "training.global_batch": "8",
        "training.max_steps": "4",
        "training.save_every": "2",
        "training.learning_rate": "1e-2",
        "output_dir": str(folder),
    }
    return load_recipe("quickstart", [f"{key}={value}" for key, value in (settings | changes).items()])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_preset_trains_is_proven_and_resumes_exactly(method, tiny_base, tmp_path, monkeypatch):
    changes = {"adapter": "{method: full}"} if method == "full" else {}
    wanted = recipe(tmp_path / "run", tiny_base, **changes)
    run = train_recipe(wanted)
    losses = metric(run.path)
    assert len(losses) == 4
    # A new model knows nothing: ln(360) = 5.886, and hidden · σ² / 2 = 0.013 for the spread of its logits.
    assert losses[0] == pytest.approx(5.886 + 0.013, abs=0.05)
    assert losses[-1] < losses[0] - (0.5 if method == "full" else 0.001)

    config = json.loads((run.base / "config.json").read_text())
    assert (config["vocab_size"], config["max_position_embeddings"]) == (360, 384)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (None, 2, 0)
    expected = dict(initial_weights(LlamaConfig.from_pretrained(run.base), seed=42))
    stored = list(run.base.glob("*.safetensors"))
    if method == "lora":
        base = load_file(stored[0])
        assert base.keys() == expected.keys()
        assert all(torch.equal(base[name], weight) for name, weight in expected.items())
        named = json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        plain = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
        assert sum(p.numel() for p in plain.parameters()) == sum(w.numel() for w in expected.values())
    else:
        assert not stored, "full tuning keeps no copy of where it began"
    assert (run.lock["init"], run.lock["base_folder"]) == ("random", str(run.base))
    assert json.loads(run.proof_file.read_text())["ok"] is True
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == 360
    assert AutoTokenizer.from_pretrained(run.merged).chat_template
    card = run.card_file.read_text()
    assert "New weights in the shapes of `preset:tiny`" in card
    assert "base_model:" not in card

    export_run(run)  # again, with nothing in memory
    opened = open_source(str(run.path))
    assert opened.context == 384

    again = recipe(tmp_path / "again", tiny_base, **changes)
    train_recipe(again)
    assert metric(tmp_path / "again") == losses, "the same seed gives the same weights"
    checks.shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-4")
    train_recipe(again, resume=True)
    assert metric(tmp_path / "again") == losses
    moved = tmp_path / "moved"
    (tmp_path / "again").rename(moved)
    export_run(moved)  # its base moved with it


def test_a_lost_base_is_said_and_never_replaced(tiny_base, tmp_path):
    wanted = recipe(tmp_path / "run", tiny_base, **{"training.max_steps": "2", "export.merged": "false"})
    run = train_recipe(wanted)
    checks.shutil.rmtree(run.base)
    with pytest.raises(UserError, match="own base is gone"):
        export_run(Run(run.path))
    with pytest.raises(UserError, match="own base is gone"):
        train_recipe(wanted, resume=True)


def test_shapes_of_another_model_without_its_weights(tiny_base, tmp_path):
    """`init: random` reads no weights, not even damaged ones, and takes shapes and vocabulary from the config."""
    config_only = tmp_path / "config-only"
    config_only.mkdir()
    for file in tiny_base.iterdir():
        if file.suffix == ".json":
            (config_only / file.name).write_bytes(file.read_bytes())
    (config_only / "model.safetensors").write_bytes(b"damaged")
    changes = {"model.base": str(config_only), "model.tokenizer": "null", "model.init": "random"}
    run = train_recipe(
        recipe(tmp_path / "run", tiny_base, **changes, **{"training.seed": "7", "training.max_steps": "2"})
    )
    written, original = (json.loads((folder / "config.json").read_text()) for folder in (run.base, config_only))
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "initializer_range")
    assert {key: written[key] for key in same} == {key: original[key] for key in same}
    expected = dict(initial_weights(LlamaConfig.from_pretrained(run.base), seed=7))
    found = load_file(run.base / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert json.loads(run.proof_file.read_text())["ok"] is True
    assert "New weights in the shapes of a LLaMA from a local folder" in run.card_file.read_text()


def test_weights_are_kept_in_the_recipes_type(tiny_base, tmp_path):
    changes = {"model.dtype": "bfloat16", "training.max_steps": "2", "export.merged": "false"}
    run = train_recipe(recipe(tmp_path / "run", tiny_base, **changes))
    stored = load_file(run.base / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    built = build_random(LlamaConfig.from_pretrained(run.base), 42, torch.bfloat16)
    assert all(torch.equal(stored[name], weight) for name, weight in built.named_parameters())
    reopened = load_model(run.base, torch.bfloat16)
    assert all(
        torch.equal(a, b) for a, b in zip(reopened.state_dict().values(), built.state_dict().values(), strict=True)
    )


def test_a_preset_takes_rope_scaling_to_its_own_context(tiny_base, tmp_path):
    """With scaling the preset's 512 tokens count, and the base's folder says so to everybody."""
    changes = {"model.rope_scaling": "{rope_type: yarn, factor: 2}", "sequence.max_length": "1024"}
    run = train_recipe(recipe(tmp_path / "run", tiny_base, **changes, **{"training.max_steps": "2"}))
    for folder in (run.base, run.merged):
        config = json.loads((folder / "config.json").read_text())
        assert config["max_position_embeddings"] == 1024
        assert config["rope_parameters"]["original_max_position_embeddings"] == 512
    assert open_source(str(run.path)).context == 1024


def test_too_long_for_the_base(tiny_base, tmp_path):
    """The base's own config decides, at the start of the run: 512 tokens, 1024 with a factor of 2."""
    changes = {"model.base": str(tiny_base), "model.tokenizer": "null", "sequence.max_length": "1025"}
    with pytest.raises(UserError) as caught:
        train_recipe(recipe(tmp_path / "run", tiny_base, **changes))
    [problem] = caught.value.problems
    assert problem.key == "sequence.max_length"
    assert problem.what.endswith("can read, 512")
    assert problem.hint == "write 512 or less, or set model.rope_scaling"
    with pytest.raises(UserError) as caught:
        train_recipe(
            recipe(tmp_path / "run", tiny_base, **changes, **{"model.rope_scaling": "{rope_type: linear, factor: 2}"})
        )
    [problem] = caught.value.problems
    assert problem.what.endswith("can read, 1024 with rope_type: linear")
    assert problem.hint == "write 1024 or less, or a factor of 3"


def test_the_base_counts_on_the_disk(tiny_base, tmp_path, monkeypatch):
    """A model of 6.7 billion weights is refused before a byte of it is made."""
    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage._replace(free=10 * 2**30))
    wanted = recipe(
        tmp_path / "run",
        tiny_base,
        **{"model.base": "preset:llama-2-7b", "model.dtype": "bfloat16", "export.merged": "false"},
    )
    with pytest.raises(MachineFault, match="new base"):
        train_recipe(wanted)
    assert PRESETS["llama-2-7b"].memory("bfloat16") > 10 * 2**30
    assert not (tmp_path / "run" / "base").exists()


def grown_tokenizer(base: Path, folder: Path, tokens: int) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(tokens)])
    tokenizer.save_pretrained(folder)
    return folder


def test_full_tuning_learns_new_tokens(tiny_base, tmp_path):
    grown = grown_tokenizer(tiny_base, tmp_path / "grown", 3)
    changes = {
        "model.base": str(tiny_base),
        "model.tokenizer": str(grown),
        "adapter": "{method: full}",
        "training.max_steps": "2",
    }
    run = train_recipe(recipe(tmp_path / "run", tiny_base, **changes))
    assert json.loads(run.proof_file.read_text())["ok"] is True
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    assert merged.config.vocab_size == merged.get_input_embeddings().weight.shape[0] == 363
    export_run(run)  # from the checkpoint, with nothing in memory
    assert json.loads((run.merged / "config.json").read_text())["vocab_size"] == 363


def test_an_adapter_does_not_learn_another_tokenizer(tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(350)
    model.save_pretrained(tmp_path / "small")
    changes = {"model.base": str(tmp_path / "small"), "model.tokenizer": str(tiny_base)}
    wanted = recipe(tmp_path / "run", tiny_base, **changes)
    with pytest.raises(UserError, match="is beyond the model's vocabulary of 350") as caught:
        train_recipe(wanted)
    assert "adapter: {method: full}" in str(caught.value)
    with pytest.raises(UserError, match="has 360 tokens of its own and the base model 350"):
        train_recipe(wanted, allow=["vocabulary"])


def test_the_plan_and_the_machine_know_that_tokens_were_added(tiny_base, tmp_path):
    """Embedding and head are trained then: their optimizer states and their gradients are counted."""
    grown = grown_tokenizer(tiny_base, tmp_path / "grown", 3)
    wanted = recipe(tmp_path / "run", tiny_base, **{"model.base": str(tiny_base), "model.tokenizer": str(grown)})
    prepared = prepare_data(wanted)
    base = open_base(wanted, Run(tmp_path / "run"), prepared.tokenizer)
    plan = plan_of_run(base, prepared, PartialState(cpu=True))
    assert base.grown and plan.case.weights.grown
    assert plan.case.weights.trained == base.trained
    flops = [token_flops(wanted, base.shape, prepared.lengths, grown=one)(0.5) for one in (True, False)]
    assert flops[0] > flops[1]
