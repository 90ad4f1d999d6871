"""The 4-bit checkpoint: opened by transformers as it is, proven, refused where it is not what was merged."""

from __future__ import annotations

import json

import pytest
import torch
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
