"""All types, with llama.cpp's own quantiser and runtime. By hand: `pytest -m slow` and this file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ft.export.gguf import write as write_module
from llama_ft.export.gguf.entries import NO_BOS
from llama_ft.export.gguf.formats import FORMATS
from llama_ft.export.gguf.write import FormatRefused, write_ggufs
from llama_ft.export.run import export_run
from llama_ft.tokenizer.load import load_tokenizer
from tests.export.gguf_runs import fields, state
from tests.tiny_run import make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None,
        reason="llama-cpp-python is not installed (pip install 'llama-ft[gguf]')",
    ),
]


def test_every_type_of_smollm2(smollm2, tmp_path):
    """The real model, all 30 layers, with a LoRA of four steps."""
    run, _, _ = make_run(tmp_path / "run", smollm2)
    export_run(run)
    found = write_ggufs(run, list(FORMATS))
    assert list(found) == [f"gguf/{name}" for name in FORMATS]
    sizes = [proof["bytes"] for proof in found.values()]
    assert sizes[0] > 1.9 * sizes[1]
    assert sorted(sizes[3:], reverse=True) == sizes[3:]
    for name, proof in found.items():
        own = proof["llama_cpp"]
        assert own["faults"] == [], name
        assert own["prompts_equal"] == own["prompts_tokenised"] == 3
        said = fields(run.path / proof["file"])
        assert said["tokenizer.chat_template"] == NO_BOS + (run.merged / "chat_template.jinja").read_text()
        assert said["tokenizer.ggml.eos_token_id"] == 2
    assert found["gguf/q4_k_m"]["tensor_types"].get("q4_k")
    assert "q5_1" not in found["gguf/q5_k_m"]["tensor_types"]
    assert "FROM ./tiny-q4_k_m.gguf" in (run.path / "gguf" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("tokens", "template"),
    [("llama2", "llama2-chat"), ("llama2", "vicuna_v1.1"), ("llama2", "alpaca"), ("llama3", "llama3-chat")],
)
def test_llama_cpp_reads_prompts_as_training_did(real_data, tmp_path, tokens, template):
    """Llama 2's and 3's own tokenizers, on random weights."""
    tokenizer = load_tokenizer(real_data / "tokenizers" / f"{tokens}_tokenizer.model")
    base = random_base(tmp_path / "base", tokenizer)
    run, _, _ = make_run(tmp_path / "run", base, template=template)
    export_run(run)
    own = write_ggufs(run, ["f16"])["gguf/f16"]["llama_cpp"]
    assert own["faults"] == []
    assert own["prompts_equal"] == own["prompts_tokenised"] == 3
    assert own["measured"]["mean_kl"] < 1e-4


def test_tokens_that_differ_are_refused(real_data, tmp_path, monkeypatch):
    """A file that says a text begins with a space piece, while in training it did not."""
    tokenizer = load_tokenizer(real_data / "tokenizers" / "llama2_tokenizer.model")
    run, _, _ = make_run(tmp_path / "run", random_base(tmp_path / "base", tokenizer), template="llama2-chat")
    export_run(run)
    real = write_module.run_script

    def damaged(script, task, *args, **kwargs):
        answer = real(script, task, *args, **kwargs)
        state(Path(task["out"]), "tokenizer.ggml.add_space_prefix", True)
        return answer

    monkeypatch.setattr(write_module, "run_script", damaged)
    with pytest.raises(FormatRefused, match=r"in llama\.cpp: prompt 1 has other tokens than in training"):
        write_ggufs(run, ["f16"])


def random_base(folder: Path, tokenizer) -> Path:
    """A LLaMA with another family's tokenizer, 64 wide."""
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=512, initializer_range=0.15, **shape, **ends
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
