"""The proof of a model that memory does not hold measures what the proof of whole models does, and refuses alike."""

from __future__ import annotations

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ft.adapters import merge as merge_module
from llama_ft.errors import UserError
from llama_ft.export import run as export_module
from llama_ft.export import streamed
from llama_ft.export.job import trained_model
from llama_ft.export.proof import choose_documents, observe
from llama_ft.export.run import ProofFailed, export_run
from llama_ft.llama.checkpoints.shards import stored_tensors
from llama_ft.llama.load import load_config
from tests.export.conftest import copy_of

VARIANTS = {
    "LoRA": {},
    "DoRA, rsLoRA": {"adapter__dora": True, "adapter__rslora": True},
    "bfloat16 base": {"model__dtype": "bfloat16", "export__dtype": "float32"},
    "LLM.int8()": {"adapter__method": "qlora", "adapter__bits": 8},
    "full": {"adapter__method": "full"},
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr("llama_ft.adapters.rows.PART_BYTES", 5000)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "full"])
def test_it_sees_what_the_whole_models_see(trained, tmp_path, variant):
    """Logits of both sides equal those of PEFT on our LLaMA, and of transformers' from_pretrained."""
    from transformers import LlamaForCausalLM

    source, _, prepared = trained(**VARIANTS[variant])
    run = copy_of(source, tmp_path / "run")
    export_run(run, low_memory=False)
    documents = choose_documents(prepared.eval, longest=40)[:3]
    job = export_module._open(run, None, export_module.Options())
    requantise = None
    if run.recipe.adapter.method == "qlora":
        requantise = export_module.requantised(run.recipe.adapter, job.device, job.compute)
    dtype = getattr(torch, run.recipe.model.dtype)
    ours = streamed.trained_side(load_config(job.base), job.base, job.lora, dtype, requantise)
    merged = streamed.merged_side(run.merged)
    pairs = [(ours, trained_model(job)), (merged, LlamaForCausalLM.from_pretrained(run.merged))]
    for side, expected in pairs:
        assert not any(parameter.numel() > 64 for parameter in side.parameters()), "it holds weights"
        found = streamed.observe_streamed(side, documents)
        reference = observe(expected, documents, [])
        for one, other, document in zip(found.logits, reference.logits, documents, strict=True):
            assert one.shape == other.shape == (len(document.ids), load_config(run.merged).vocab_size)
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_passes_where_the_merge_is_right(trained, tmp_path, variant, capsys):
    run = copy_of(trained(**VARIANTS[variant])[0], tmp_path / "run")
    if variant == "full":  # nothing but a checkpoint is left
        (run.checkpoint(4)).mkdir(parents=True)
        source = trained(**VARIANTS[variant])[0]
        for file in source.merged.iterdir():
            (run.checkpoint(4) / file.name).write_bytes(file.read_bytes())
    proof = export_run(run, low_memory=True).proof
    assert proof["ok"] and proof["greedy"] == [] and proof["measured"]["documents"] == 4
    assert proof["computed_in"].endswith("weights read from disk as they are multiplied with")
    assert "equal greedy answers   not asked" in capsys.readouterr().out
    assert (run.merged / "model.safetensors").exists() and json.loads(run.proof_file.read_text())["ok"]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.v_proj.weight"])
def test_it_refuses_damaged_weights(run, monkeypatch, name):
    def damaged(*args, **kwargs):
        result = merge_module.merge_adapter(*args, **kwargs)
        tensors = load_file(result.path / "model.safetensors")
        tensors[name] *= 1.02
        save_file(tensors, result.path / "model.safetensors", metadata={"format": "pt"})
        return result

    monkeypatch.setattr(export_module, "merge_adapter", damaged)
    with pytest.raises(ProofFailed, match=r"max \|Δ logit\| is .*, allowed 0.001"):
        export_run(run, low_memory=True)
    assert not run.merged.exists()


def test_it_names_weights_that_do_not_fit(run):
    export_run(run)
    file = run.merged / "model.safetensors"
    tensors = load_file(file)
    tensors["model.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        streamed.merged_side(run.merged)
    for said in (
        "missing: model.layers.1.mlp.up_proj",
        "unexpected: model.extra",
        "model.norm.weight is [3], not [64]",
    ):
        assert said in str(caught.value)


def test_it_is_chosen_where_memory_is_short(run, monkeypatch):
    stored = stored_tensors(export_module._open(run, None, export_module.Options()).base)
    size = 4 * sum(torch.Size(entry.shape).numel() for entry in stored.values())
    for free, expected in ((size, True), (2 * size, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert streamed.too_large(stored) is expected
    monkeypatch.setattr(streamed.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    assert export_run(run).proof["greedy"] == []
