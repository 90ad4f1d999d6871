"""The 4-bit checkpoint: opened by transformers as it is, proven, refused where it is not what was merged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ft.errors import UserError
from llama_ft.export import nf4
from llama_ft.export.run import export_run
from tests.tiny_run import make_base, make_run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run whose rows bitsandbytes can cut on a CPU."""
    base = make_base(tmp_path_factory.mktemp("base"), intermediate_size=128)
    run, _, _ = make_run(tmp_path_factory.mktemp("run"), base)
    export_run(run)
    return run


def formats(run) -> dict:
    return json.loads(run.proof_file.read_text())["formats"]


def test_a_stranger_opens_it(exported):
    proof = nf4.write_nf4(exported)
    assert proof["ok"] and formats(exported) == {"nf4": proof} and json.loads(exported.proof_file.read_text())["ok"]
    folder = exported.path / "nf4"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    assert kind == "Linear4bit" and model.generation_config.eos_token_id == [2]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(exported.merged).chat_template
    half = sum(file.stat().st_size for file in exported.merged.glob("*.safetensors")) // 2
    assert proof["bytes"] < half and proof["measured"]["top1_agreement"] + 0.4 > 0.9
    assert not list(exported.path.glob(".*"))
    again = nf4.write_nf4(exported)
    assert again["measured"] == proof["measured"]


def test_a_damaged_weight_is_refused(exported, monkeypatch):
    nf4.write_nf4(exported)
    real = nf4.without_quantisation

    def damaged(model):
        real(model)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight *= 1.2

    monkeypatch.setattr(nf4, "without_quantisation", damaged)
    with pytest.raises(nf4.Nf4Refused, match=r"layers\.1\.mlp\.down_proj.*allowed 0\.12"):
        nf4.write_nf4(exported)
    assert not (exported.path / "nf4").exists() and formats(exported)["nf4"]["ok"] is False
    assert (exported.merged / "config.json").exists()


def on_nf4(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes import functional

    four, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return functional.dequantize_4bit(four, state).float()


@pytest.fixture(scope="module")
def small_change(tmp_path_factory):
    """run(onto): exported; its base's projections went through `onto`, and what was learnt is small beside them."""

    def make(onto):
        base = make_base(tmp_path_factory.mktemp("base"), intermediate_size=128)
        weights = load_file(base / "model.safetensors")
        weights = {name: onto(tensor) if "proj" in name else tensor for name, tensor in weights.items()}
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        run, _, _ = make_run(tmp_path_factory.mktemp("run"), base)
        file = run.adapter / "adapter_model.safetensors"
        factors = {name: t * 0.02 if "lora_B" in name else t for name, t in load_file(file).items()}
        save_file(factors, file, metadata={"format": "pt"})
        export_run(run)
        return run

    return make


def test_what_was_learnt_survives_rounding(small_change):
    """A tenth of a step of 4 bits, on weights that lie anywhere: some cross over to the next value."""
    proof = nf4.write_nf4(small_change(lambda weight: weight))
    assert proof["ok"] and 0.5 < proof["learnt_kept"] < 1.5


def test_a_copy_that_is_the_base_again_is_refused(small_change):
    """All of them lie on NF4's values, as in a QLoRA: none crosses, and answers alone would not show it."""
    run = small_change(on_nf4)
    with pytest.raises(nf4.Nf4Refused, match="of what training added") as caught:
        nf4.write_nf4(run)
    assert len(caught.value.problems) == 1, "everything else is within its limits"
    assert formats(run)["nf4"]["learnt_kept"] < 0.1


def test_other_bits_than_were_written_are_refused(exported, monkeypatch):
    digests = iter(["one", "another"])
    monkeypatch.setattr(nf4, "digest", lambda model: next(digests))
    with pytest.raises(nf4.Nf4Refused, match="others than were written"):
        nf4.write_nf4(exported)


def test_what_cannot_be_made_is_said(exported, tmp_path):
    with pytest.raises(UserError, match="has no merged/ to quantise"):
        nf4.write_nf4(type(exported)(tmp_path))
    run, _, _ = make_run(tmp_path / "odd", make_base(tmp_path / "base"))
    export_run(run)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="rows of a multiple of 64 weights, the model has rows of 160"):
            nf4.write_nf4(run)
