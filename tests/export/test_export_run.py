"""The export of a tiny run: what it writes, that it proves, and above all that it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ft.adapters import merge as merge_module
from llama_ft.adapters.lora_file import LoraFile, read_lora
from llama_ft.errors import MachineFault, UserError
from llama_ft.export import run as export_module
from llama_ft.export.run import Export, ProofFailed, export_run
from llama_ft.recipe.run import Run
from tests.export.conftest import copy_of


def proof_of(run: Run) -> dict:
    return json.loads(run.proof_file.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# What it writes


def test_a_float32_run(run, capsys):
    result = export_run(run)
    assert result == Export(run.merged, proof_of(run), True)
    proof = result.proof
    assert proof["ok"] is True
    assert proof["faults"] == []
    assert proof["tolerance"] == {"max_delta": 1e-3, "mean_kl": None, "top1": None, "greedy": "equal"}
    measured = proof["measured"]
    assert 0 < measured["max_delta_logit"] < 1e-4
    assert 0 <= measured["mean_kl"] < 1e-8
    assert measured["top1_agreement"] == 1.0
    assert measured["documents"] == 8
    assert measured["positions"] >= 200
    assert measured["nll_trained"] == pytest.approx(measured["nll_merged"], abs=1e-5)
    assert len(proof["prompts"]) == 8
    assert "llama number 16" in proof["prompts"][0]
    assert [answer["equal"] for answer in proof["greedy"]] == [True] * 3
    assert all(answer["trained"] == answer["merged"] for answer in proof["greedy"])
    assert proof["greedy"][0]["prompt"].endswith("<|im_start|>assistant\n")
    assert proof["adapter"]["tensors"] == 28  # 2 layers × 7 projections × 2 factors
    assert proof["adapter"]["scale"] == 2.0
    assert proof["adapter"]["equals_memory"] is None
    assert proof["opened_with"] == f"transformers {transformers.__version__} LlamaForCausalLM"
    assert datetime.fromisoformat(proof["created"]).utcoffset().total_seconds() == 0
    assert not list(run.path.glob(".*")), "nothing is left aside"
    said = capsys.readouterr().out
    assert "proof passed: merged (float32)" in said
    assert "max |Δ logit|" in said
    assert f"next: llama-ft chat {run.path}" in said
    assert "\x1b" not in said
    assert "│" not in said


def test_sampling_of_the_recipe_is_what_servers_are_told(trained, tmp_path, capfd):
    """The proof asks greedily all the same."""
    run = copy_of(trained(export__sampling="{temperature: 0.6, top_p: 0.9}")[0], tmp_path / "run")
    assert export_run(run).proof["greedy"][0]["equal"] is True
    said = capfd.readouterr()
    assert "temperature" not in said.out + said.err, "transformers warns of a temperature that is not used"
    generation = json.loads((run.merged / "generation_config.json").read_text())
    generation.pop("transformers_version")
    drawn = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}
    assert generation == {**drawn, "eos_token_id": [2], "pad_token_id": 0}


def test_the_folder_is_an_ordinary_llama(run, tiny_base):
    export_run(run)
    config = json.loads((run.merged / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert (config["eos_token_id"], config["pad_token_id"], config["use_cache"]) == (2, 0, True)
    generation = json.loads((run.merged / "generation_config.json").read_text())
    generation.pop("transformers_version")
    assert generation == {"do_sample": False, "eos_token_id": [2], "pad_token_id": 0}
    assert set(load_file(run.merged / "model.safetensors")) == set(load_file(tiny_base / "model.safetensors"))
    template = (run.merged / "chat_template.jinja").read_text()
    assert "{%- generation -%}" in template
    here = [str(run.path), str(tiny_base), os.sep + "tmp" + os.sep, str(Path.home())]
    for name, data in contents(run.merged).items():
        assert not any(place.encode() in data for place in here), f"{name} carries a path of this machine"


def test_no_code_of_ours_is_needed(run, tmp_path):
    """In another process, where our package cannot be imported."""
    export_run(run)
    code = """
import json, sys
sys.modules["llama_ft"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert type(model).__module__ == "transformers.models.llama.modeling_llama", type(model)
assert not any(report.values()), report
turns = json.loads(sys.argv[2])
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=48)
print(json.dumps({"text": tokenizer.decode(out[0]), "prompt": tokenizer.decode(ids["input_ids"][0])}))
"""
    turns = json.dumps([{"role": "user", "content": "What does llama number 16 eat on hill 2?"}])
    command = [sys.executable, "-c", code, str(run.merged), turns]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    first = proof_of(run)["greedy"][0]
    assert said["prompt"] == first["prompt"]
    assert said["text"] == first["prompt"] + first["trained"]


def test_a_bfloat16_run_is_judged_by_its_probabilities(trained, tmp_path):
    run, model, _ = trained(model__dtype="bfloat16")
    run = copy_of(run, tmp_path / "run")
    try:
        proof = export_run(run, trained=model).proof
    except ProofFailed:  # a random model is all near ties: top-1 may fall below 99 %
        proof = proof_of(run)
        assert all("top-1" in fault for fault in proof["faults"])
    assert proof["dtype"] == "bfloat16"
    assert proof["tolerance"] == {"max_delta": None, "mean_kl": 1e-3, "top1": 0.99, "greedy": "near ties"}
    assert 1e-3 < proof["measured"]["max_delta_logit"] < 1
    assert 1e-9 < proof["measured"]["mean_kl"] < 1e-3
    for answer in proof["greedy"]:
        assert answer["equal"] or answer["top2_gap"] < 2 * proof["measured"]["max_delta_logit"]


def test_float32_of_a_bfloat16_base_rounds_nothing(trained, tmp_path, tiny_base):
    run, model, _ = trained(model__dtype="bfloat16", export__dtype="float32")
    run = copy_of(run, tmp_path / "run")
    assert export_run(run, trained=model).proof["measured"]["max_delta_logit"] < 1e-4
    embedding = "model.embed_tokens.weight"
    written = load_file(run.merged / "model.safetensors")[embedding]
    assert torch.equal(written, load_file(tiny_base / "model.safetensors")[embedding].bfloat16().float())


def test_without_held_out_rows_training_documents_serve(trained, tmp_path):
    run = copy_of(trained(eval_data="null")[0], tmp_path / "run")
    proof = export_run(run).proof
    assert proof["ok"]
    assert proof["measured"]["positions"] >= 200
    assert len(proof["greedy"]) == 3
    assert "llama number 0 " in proof["prompts"][0]
    assert proof["greedy"][0]["prompt"].endswith("<|im_start|>assistant\n")


def test_the_alpaca_template(trained, tmp_path):
    run = copy_of(trained(template="alpaca")[0], tmp_path / "run")
    proof = export_run(run).proof
    assert proof["ok"]
    assert proof["greedy"][0]["prompt"].endswith("### Response:")


def test_a_second_export_replaces_the_first(run):
    first = export_run(run)
    (run.merged / "stranger.txt").write_text("from before")
    again = export_run(str(run.path))
    assert not (run.merged / "stranger.txt").exists()
    timeless = [{**one.proof, "created": None} for one in (first, again)]
    assert timeless[0] == timeless[1]


def test_a_bare_name_finds_the_run(run, monkeypatch):
    runs = run.path.parent / "runs"
    runs.mkdir()
    run.path.rename(runs / "mine")
    monkeypatch.chdir(run.path.parent)
    assert export_run("mine").path == (runs / "mine" / "merged").resolve()


def test_the_command(run):
    command = [sys.executable, "-m", "llama_ft.cli", "export", str(run.path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "proof passed" in result.stdout
    assert "Warning" not in result.stderr


# A fully tuned run


def test_a_full_run_is_compared_with_the_model_in_memory(trained, tmp_path):
    run, model, _ = trained(adapter__method="full")
    run_copy = copy_of(run, tmp_path / "run")
    shutil.copytree(run.merged, run_copy.merged)
    model.train()
    result = export_run(run_copy, trained=model)
    assert result.proof["adapter"] is None
    assert result.proof["measured"]["max_delta_logit"] < 1e-4
    assert model.training, "the model is left as it was"
    config = json.loads((run_copy.merged / "config.json").read_text())
    assert (config["architectures"], config["use_cache"]) == (["LlamaForCausalLM"], True)


def test_a_full_run_that_was_saved_wrongly_is_refused(trained, tmp_path):
    run, model, _ = trained(adapter__method="full")
    run_copy = copy_of(run, tmp_path / "run")
    shutil.copytree(run.merged, run_copy.merged)
    scale(run_copy.merged, "model.layers.0.mlp.up_proj.weight", 1.02)
    with pytest.raises(ProofFailed):
        export_run(run_copy, trained=model)
    assert not run_copy.merged.exists()


def test_a_full_run_is_exported_again_from_its_newest_checkpoint(trained, tmp_path):
    run, model, _ = trained(adapter__method="full")
    run_copy = copy_of(run, tmp_path / "run")
    with pytest.raises(UserError, match="holds no checkpoint"):
        export_run(run_copy)
    model.save_pretrained(run_copy.checkpoint(4))
    assert export_run(run_copy).proof["measured"]["max_delta_logit"] < 1e-4
    saved = load_file(run_copy.merged / "model.safetensors")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in saved.items())


# What it refuses: the merged weights are not what was trained


def scale(folder: Path, name: str, factor: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] * factor
    save_file(tensors, path, metadata={"format": "pt"})


def swap(folder: Path, left: str, right: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[left], tensors[right] = tensors[right], tensors[left]
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGES = {
    "one tensor two per cent too large": lambda folder: scale(folder, "model.layers.1.self_attn.v_proj.weight", 1.02),
    "a norm two per cent too large": lambda folder: scale(folder, "model.norm.weight", 1.02),
    "two layers swapped": lambda folder: swap(
        folder, "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    ),
    "gate and up swapped": lambda folder: swap(
        folder, "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused(run, damage, monkeypatch, capsys):
    export_run(run)  # a good one stands there

    def damaged(*args, **kwargs):
        result = merge_module.merge_adapter(*args, **kwargs)
        damage(result.path)
        return result

    with (
        monkeypatch.context() as patch,
        pytest.raises(ProofFailed, match=r"max \|Δ logit\| is .*, allowed 0.001") as caught,
    ):
        patch.setattr(export_module, "merge_adapter", damaged)
        export_run(run)
    assert caught.value.exit_code == 2
    assert caught.value.block().startswith("llama-ft: the export was refused")
    proof = proof_of(run)
    assert proof["ok"] is False
    assert proof["faults"]
    assert not run.merged.exists(), "nobody may serve it"
    assert (run.path / "merged.rejected" / "model.safetensors").exists()
    assert "proof FAILED" in capsys.readouterr().out
    assert "refused and is not part of this run" in run.card_file.read_text()
    assert export_run(run).ok
    assert not (run.path / "merged.rejected").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_scale_is_refused(trained, tmp_path, monkeypatch, dtype):
    run = copy_of(trained(export__dtype=dtype)[0], tmp_path / "run")

    def doubled(base, adapter, out, **kwargs):
        twice = {name: (down, up * 2) for name, (down, up) in read_lora(run.adapter).factors.items()}
        return merge_module.merge_adapter(base, LoraFile(**{**vars(adapter), "factors": twice}), out, **kwargs)

    monkeypatch.setattr(export_module, "merge_adapter", doubled)
    with pytest.raises(ProofFailed) as caught:
        export_run(run)
    expected = "max |Δ logit|" if dtype == "float32" else "mean KL"
    assert any(expected in problem.what for problem in caught.value.problems)


def test_weights_that_overflow_are_refused(run, monkeypatch):
    def damaged(*args, **kwargs):
        result = merge_module.merge_adapter(*args, **kwargs)
        scale(result.path, "model.layers.0.input_layernorm.weight", float("nan"))
        return result

    monkeypatch.setattr(export_module, "merge_adapter", damaged)
    with pytest.raises(ProofFailed, match="is nan"):
        export_run(run)
    assert proof_of(run)["measured"]["max_delta_logit"] is None  # JSON has no NaN


def test_weights_that_do_not_fit_the_config_are_refused(run, monkeypatch):
    def damaged(*args, **kwargs):
        result = merge_module.merge_adapter(*args, **kwargs)
        path = result.path / "model.safetensors"
        tensors = load_file(path)
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        save_file(tensors, path, metadata={"format": "pt"})
        return result

    monkeypatch.setattr(export_module, "merge_adapter", damaged)
    with pytest.raises(UserError, match=r"missing_keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        export_run(run)
    assert not run.merged.exists()
    assert not list(run.path.glob(".*"))


def test_a_template_that_renders_otherwise_is_refused(run, monkeypatch):
    real = export_module.write_companions

    def other(folder, *args):
        real(folder, *args)
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant\\n", "assistant:\\n"))

    monkeypatch.setattr(export_module, "write_companions", other)
    with pytest.raises(ProofFailed, match="the exported chat template differs from training at token"):
        export_run(run)


def test_a_generation_config_that_does_not_stop_is_refused(run, monkeypatch):
    """The merged model answers by its own generation_config: here it would stop at the first space."""
    real = export_module.write_companions

    def other(folder, *args):
        real(folder, *args)
        path = folder / "generation_config.json"
        stop = AutoTokenizer.from_pretrained(folder).encode(" ")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": stop + list(range(3, 300))}))

    monkeypatch.setattr(export_module, "write_companions", other)
    with pytest.raises(ProofFailed, match="greedy answer 1 differs"):
        export_run(run)


# What it refuses: the adapter is not what was trained


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_changed_alpha_is_refused(run):
    edit_json(run.adapter / "adapter_config.json", lora_alpha=9)
    with pytest.raises(UserError, match=r"the adapter's scale is 2\.25, the recipe's alpha / r is 2"):
        export_run(run)
    assert not run.merged.exists()


def test_rs_lora_that_nobody_asked_for_is_refused(run):
    edit_json(run.adapter / "adapter_config.json", use_rslora=True)
    with pytest.raises(UserError, match="the adapter's scale is 4"):
        export_run(run)


def test_an_adapter_that_differs_from_memory_is_refused(trained, tmp_path):
    run, model, _ = trained()
    run = copy_of(run, tmp_path / "run")
    assert export_run(run, trained=model).proof["adapter"]["equals_memory"] is True
    path = run.adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in sorted(tensors) if "lora_B" in key)
    flat = tensors[name].view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))  # one bit
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"what was saved is not what was trained: .*lora_B\.default\.weight differs"):
        export_run(run, trained=model)


def test_a_scale_that_differs_from_memory_is_refused(trained, tmp_path):
    run, model, _ = trained()
    run = copy_of(run, tmp_path / "run")
    layers = [module for module in model.modules() if hasattr(module, "scaling")]
    layers[3].scaling["default"] = 4.0
    try:
        with pytest.raises(UserError, match="the adapter's scale differs"):
            export_run(run, trained=model)
    finally:
        layers[3].scaling["default"] = 2.0


def test_a_base_that_changed_since_is_refused(trained, tiny_base, tmp_path):
    run, model, _ = trained()
    run = copy_of(run, tmp_path / "run")
    shutil.copytree(tiny_base, tmp_path / "other")
    scale(tmp_path / "other", "model.layers.0.mlp.up_proj.weight", 1.001)
    edit_json(run.lock_file, base_folder=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"what was saved is not what was trained: .*up_proj"):
        export_run(run, trained=model)


def test_a_zero_adapter_is_refused(run):
    path = run.adapter / "adapter_model.safetensors"
    save_file({name: t.zero_() if "lora_B" in name else t for name, t in load_file(path).items()}, path)
    with pytest.raises(UserError, match="the adapter is zero: nothing was trained"):
        export_run(run)


def test_an_unfinished_run_is_refused(run):
    shutil.rmtree(run.adapter)
    run.checkpoint(2).mkdir(parents=True)
    with pytest.raises(UserError, match="its training did not end — finish it: llama-ft train RECIPE --resume"):
        export_run(run)


def test_a_template_changed_since_training_is_refused(run):
    (run.adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="the template 'chatml' is not the one the run was trained with"):
        export_run(run)


def test_a_base_that_moved_is_found_through_the_recipe(run):
    edit_json(run.lock_file, base_folder="/nowhere/at/all")
    assert export_run(run).ok


# The disk, and interruptions


def test_a_full_disk_keeps_the_old_export(run, monkeypatch):
    export_run(run)
    before = contents(run.merged)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_companions", full)
    with pytest.raises(MachineFault, match="could not write merged: the disk is full") as caught:
        export_run(run)
    assert caught.value.exit_code == 1
    assert contents(run.merged) == before
    assert not list(run.path.glob(".*"))


def test_an_interrupted_export_keeps_the_old_one(run, monkeypatch):
    export_run(run)
    before = contents(run.merged)
    monkeypatch.setattr("llama_ft.export.prove.observe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_run(run)
    assert contents(run.merged) == before
    assert proof_of(run)["ok"]
    assert not list(run.path.glob(".*"))


# The real thing


def test_smollm2(smollm2, tmp_path, monkeypatch):
    """SmolLM2-135M in bfloat16 with a LoRA of a few steps: within the tolerances that were agreed for it."""
    from tests.tiny_run import make_run

    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path / "cache"))
    rows = "[{use: llama-qa, split: heldout}]"
    run, model, _ = make_run(tmp_path / "run", smollm2, model__dtype="bfloat16", eval_data=rows)
    proof = export_run(run, trained=model).proof
    assert proof["measured"]["mean_kl"] < 1e-3
    assert proof["measured"]["top1_agreement"] >= 0.99
    assert proof["measured"]["max_delta_logit"] > 0.01, "bfloat16 rounds"
    merged = AutoModelForCausalLM.from_pretrained(run.merged, dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert merged.generation_config.eos_token_id == [2]
    assert isinstance(model, PeftModel)
