"""A model with a tokenizer of one's own, as a GGUF file: llama.cpp cuts every text as training did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ft.data.vocabulary.train import train_on_sources
from llama_ft.errors import MachineFault
from llama_ft.export.gguf import tools
from llama_ft.export.gguf.write import write_ggufs
from llama_ft.export.run import export_run
from llama_ft.llama.grow import grow_model
from llama_ft.tokenizer.load import load_tokenizer
from tests.conftest import ROOT
from tests.export.gguf_runs import fields
from tests.tiny_run import make_run
from tests.tokenizer.test_training import ODD, random_texts


@pytest.fixture(scope="module", autouse=True)
def converter(own_cache: None) -> Path:
    try:
        return tools.converter_folder()
    except MachineFault as error:
        pytest.skip(f"the converter cannot be fetched: {error}")


def base_with(tokenizer_folder: Path, folder: Path) -> Path:
    """A random LLaMA that knows a trained tokenizer; so wide that its rounding to float16 averages out."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, **ends, initializer_range=0.15)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "model", "pre", "grown"),
    [("byte-bpe", "gpt2", "qwen2", True), ("sentencepiece", "llama", "default", False)],
)
def test_it_is_read_as_in_training(kind: str, model: str, pre: str, grown: bool, tmp_path: Path) -> None:
    """Byte-level BPE is stated to cut words as Qwen 2 does; grown merges go along. With llama.cpp: ids of odd texts."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (tmp_path / "words.txt").write_text(text, encoding="utf-8")
    words, own = [str(tmp_path / "words.txt")], tmp_path / "tokenizer"
    train_on_sources(words, own, vocab_size=420, kind=kind, special=["<|im_start|>", "<|im_end|>"])
    base = base_with(own, tmp_path / "base")
    if grown:
        train_on_sources(words, tmp_path / "other", vocab_size=520, kind=kind)
        done = grow_model(str(base), tmp_path / "grown", names=["<tool>"], other=str(tmp_path / "other"), count=30)
        base = done.folder
    run, _, _ = make_run(tmp_path / "run", base)
    export_run(run)
    found = write_ggufs(run, ["f16"])
    file = run.path / found["gguf/f16"]["file"]
    said, tokenizer = fields(file), load_tokenizer(run.merged)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == (model, pre)
    assert len(said["tokenizer.ggml.tokens"]) == len(tokenizer) == (451 if grown else 420)
    assert said["tokenizer.ggml.add_bos_token"] is True
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: the file alone was read")
    reader = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    control = [token.content for token in tokenizer.added_tokens_decoder.values()]
    texts = [one for one in [*ODD, *random_texts(300, seed=21), *text.splitlines()] if one]
    texts = [one for one in texts if "▁" not in one and not any(name in one for name in control)]
    assert len(texts) > 400
    # Behind BOS, as in a chat: SentencePiece's space before a text is left out there (docs/tokenizers.md).
    for one in texts:
        ids = tokenizer.backend_tokenizer.encode(tokenizer.bos_token + one, add_special_tokens=False).ids
        assert reader.tokenize((tokenizer.bos_token + one).encode(), add_bos=False, special=True) == ids, json.dumps(
            one
        )
