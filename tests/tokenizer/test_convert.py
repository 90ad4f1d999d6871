"""Which tokenizer belongs to a checkpoint, what is no tokenizer, and the JSON files around a SentencePiece file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llama_ft.errors import UserError
from llama_ft.tokenizer.convert import write_tokenizer
from llama_ft.tokenizer.find import find_tokenizer
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.text import TextEncoder


@pytest.fixture
def spm(real_data: Path) -> Path:
    return real_data / "tokenizers" / "llama2_tokenizer.model"


@pytest.fixture
def tok512(real_data: Path) -> Path:
    return real_data / "checkpoints" / "tok512.bin"


def put(source: Path, *dest: Path) -> None:
    for path in dest:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)


def problems(use: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        use()
    return [str(problem) for problem in caught.value.problems]


# What is no tokenizer.


@pytest.mark.parametrize(
    ("content", "said", "advice"),
    [
        (b"", "is empty", "fetch it again"),
        (b"\n\n \n", "is empty", "fetch it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n",
            "is a Git LFS pointer",
            "git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page", "login"),
        (b"\n <HTML lang=en>", "is a web page", "login"),
        (b'{"version": "1.0"}', 'is not a tokenizer: it begins with b\'{"version":', "expected tokenizer.json"),
        (b"PK\x03\x04 a zip", "is not a tokenizer: it begins with b'PK", "expected tokenizer.json"),
        (b"IQ== zero\n", "is not a tokenizer", "tiktoken ranks"),
        (b"IQ=", "is not a tokenizer", "tiktoken ranks"),
        (b"\n\x0e\n\x05<unk>\x15\0\0", "is damaged: it does not parse", "fetch it again"),
        (b"\x0a\0\0\0\0\0\0\0\x05\0\0\0<unk>", "is damaged: it begins with ['<unk>']", "export it again"),
    ],
)
def test_no_tokenizer(content: bytes, said: str, advice: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    for use in (lambda: write_tokenizer(tmp_path, tmp_path / "out"), lambda: load_tokenizer(file)):
        (problem,) = problems(use)
        assert str(file) in problem and said in problem and advice in problem
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_the_name_does_not_decide(real_data: Path, spm: Path, tok512: Path, tmp_path: Path) -> None:
    ranks = real_data / "tokenizers" / "llama3_tokenizer.model"
    sizes = {}
    for i, source in enumerate([spm, ranks, tok512]):
        put(source, tmp_path / str(i) / "tokenizer.model", tmp_path / str(i) / "x" / "some.thing")
        sizes[source] = [
            len(load_tokenizer(tmp_path / str(i))),
            len(load_tokenizer(tmp_path / str(i) / "x/some.thing")),
        ]
    assert sizes == {spm: [32_000] * 2, ranks: [128_256] * 2, tok512: [512] * 2}


# Which tokenizer belongs to a checkpoint.


def test_nothing_to_find(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\0" * 64)
    for source in (tmp_path, tmp_path / "model.bin"):
        assert write_tokenizer(source, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()
    (problem,) = problems(lambda: load_tokenizer(tmp_path / "model.bin"))
    assert problem.startswith(f"{tmp_path} holds no tokenizer")


def test_beside_a_llama2c_checkpoint(real_data: Path, spm: Path, tok512: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "stories.bin"
    put(real_data / "checkpoints" / "aidreams260K.bin", checkpoint)
    put(tok512, tmp_path / "tok512.bin")
    assert find_tokenizer(checkpoint) == tmp_path / "tok512.bin"
    assert len(load_tokenizer(checkpoint)) == 512

    put(spm, tmp_path / "tokenizer.model")
    assert find_tokenizer(checkpoint, 512) == tmp_path / "tok512.bin"
    assert find_tokenizer(checkpoint, 32_000) == tmp_path / "tokenizer.model"
    assert write_tokenizer(checkpoint, tmp_path / "out", vocab_size=512) == tmp_path / "tok512.bin"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 512
    listed = "(tokenizer.model: 32,000 tokens; tok512.bin: 512 tokens)"
    (problem,) = problems(lambda: find_tokenizer(checkpoint))
    assert f"of the tokenizers beside {checkpoint}, more than one is one {listed}" in problem
    (problem,) = problems(lambda: find_tokenizer(checkpoint, 4_096))
    assert f"beside {checkpoint}, none has the model's 4,096 tokens {listed}" in problem

    # The same vocabulary twice is no choice to make.
    put(tok512, tmp_path / "tokenizer.bin")
    assert find_tokenizer(checkpoint, 512) == tmp_path / "tok512.bin"
    (tmp_path / "tok512.bin").write_bytes(b"")
    assert find_tokenizer(checkpoint, 512) == tmp_path / "tokenizer.bin"
    (tmp_path / "tokenizer.bin").unlink()
    (problem,) = problems(lambda: find_tokenizer(checkpoint, 512))
    assert "tok512.bin: damaged: the tokenizer file" in problem and "is empty" in problem


def test_metas_layout(spm: Path, tmp_path: Path) -> None:
    """Meta's downloads keep tokenizer.model in the model's folder or one up, beside the folders of all sizes."""
    put(spm, tmp_path / "tokenizer.model")
    (tmp_path / "7B").mkdir()
    assert find_tokenizer(tmp_path / "7B") is None
    (tmp_path / "7B" / "params.json").write_text("{}")
    (tmp_path / "7B" / "consolidated.00.pth").write_bytes(b"PK")
    for source in (tmp_path / "7B", tmp_path / "7B" / "consolidated.00.pth"):
        assert find_tokenizer(source) == tmp_path / "tokenizer.model"
    put(spm, tmp_path / "7B" / "tokenizer.model")
    assert find_tokenizer(tmp_path / "7B" / "consolidated.00.pth") == tmp_path / "7B" / "tokenizer.model"


def test_a_tokenizer_too_large_for_the_model(spm: Path, tmp_path: Path) -> None:
    put(spm, tmp_path / "tokenizer.model")
    (problem,) = problems(lambda: write_tokenizer(tmp_path, tmp_path / "out", vocab_size=512))
    assert "has 32,000 pieces, but the model's embedding has 512 rows" in problem
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    # Rows that no piece uses are common: they round the size up.
    assert write_tokenizer(tmp_path, tmp_path / "out", vocab_size=32_064) == tmp_path / "tokenizer.model"


# Hugging Face folders.


def test_a_hugging_face_folder_is_copied(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in smollm2.iterdir():
        if (path.suffix == ".json" and "model" not in path.name) or path.suffix == ".jinja":
            put(path, tmp_path / "in" / path.name)
    put(smollm2 / "tokenizer.json", tmp_path / "in" / "unrelated.json")
    assert write_tokenizer(tmp_path / "in", tmp_path / "out", vocab_size=49_152) == tmp_path / "in" / "tokenizer.json"
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= copied
    assert not copied & {"config.json", "generation_config.json", "unrelated.json"}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert write_tokenizer(tmp_path / "in", tmp_path / "in") == tmp_path / "in" / "tokenizer.json"


def test_a_bare_tokenizer_json_gets_a_class(spm: Path, tmp_path: Path) -> None:
    """Without one, transformers builds LlamaTokenizer's own pre-tokenizer beside a LLaMA's config."""
    write_tokenizer(spm, tmp_path / "made")
    put(tmp_path / "made" / "tokenizer.json", tmp_path / "bare" / "tokenizer.json")
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4096}')
    write_tokenizer(tmp_path / "bare", tmp_path / "out")
    shutil.copyfile(tmp_path / "bare" / "config.json", tmp_path / "out" / "config.json")
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened(" a  b").input_ids == [1, 29871, 263, 29871, 289]
    assert (opened.bos_token, opened.eos_token, opened.unk_token) == ("<s>", "</s>", "<unk>")
    assert opened.model_max_length == 4096


def test_a_damaged_tokenizer_json_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (problem,) = problems(lambda: write_tokenizer(tmp_path, tmp_path / "out"))
    assert f"the tokenizer {tmp_path / 'tokenizer.json'} cannot be read" in problem
    assert not (tmp_path / "out" / "tokenizer.json").exists()


# A SentencePiece file with Hugging Face's small files around it, as many fine-tuned LLaMAs are published.


def test_settings_beside_the_file(spm: Path, tmp_path: Path) -> None:
    put(spm, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 32_001, "[PAD]": 32_000}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "[PAD]", "bos_token": {"content": "<s>"}})
    )
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "bos_token": "",  # early conversions of LLaMA left it empty
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "additional_special_tokens": ["<|tool|>"],
        "added_tokens_decoder": {"32002": {"content": "<note>", "special": False, "lstrip": True}},
        "model_max_length": 2048,
        "chat_template": "{{ messages[0].content }}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for opened in (tokenizer, load_tokenizer(tmp_path), load_tokenizer(tmp_path / "out")):
        names = ["[PAD]", "<|im_start|>", "<note>", "<|im_end|>", "<|tool|>"]
        assert opened.convert_tokens_to_ids(names) == [32_000, 32_001, 32_002, 32_003, 32_004]
        assert (opened.pad_token, opened.bos_token, opened.eos_token) == ("[PAD]", "<s>", "<|im_end|>")
        assert opened.model_max_length == 2048 and opened.chat_template == "{{ messages[0].content }}"
        assert opened("a  b<|im_end|>USER").input_ids == [1, 263, 29871, 289, 32_003, 11889]  # never legacy
        assert {32_002: False, 32_004: True}.items() <= {
            i: t.special for i, t in opened.added_tokens_decoder.items()
        }.items()
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    typed = "<|im_end|> </s><|tool|>[PAD]"
    assert max(TextEncoder(tokenizer, control).encode_sealed([typed])[0].ids) < 32_000


def test_an_end_token_that_the_config_asks_for(spm: Path, tmp_path: Path) -> None:
    put(spm, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false, "add_eos_token": true}')
    write_tokenizer(tmp_path, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello").input_ids == [15043, 2]
    assert load_tokenizer(tmp_path).bos_token is None  # it begins no text with it


def test_added_tokens_that_do_not_fit(spm: Path, tmp_path: Path) -> None:
    put(spm, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<a>": 263, "<b>": 32000, "<c>": 32005}')
    assert problems(lambda: load_tokenizer(tmp_path)) == [
        f"{tmp_path} gives '<a>' the id 263, but the vocabulary has '▁a' there",
        f"{tmp_path} gives '<c>' the id 32005, but the vocabulary ends at 32000",
    ]


def test_damaged_settings_are_all_told(spm: Path, tmp_path: Path) -> None:
    put(spm, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text("[]")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token"')
    first, second = problems(lambda: write_tokenizer(tmp_path, tmp_path / "out"))
    assert first.startswith(f"{tmp_path / 'tokenizer_config.json'}: it cannot be read")
    assert second.startswith(f"{tmp_path / 'added_tokens.json'}: it is not a JSON object")


HUB = """
from llama_ft.tokenizer.load import load_tokenizer
tokenizer = load_tokenizer("somebody/llama")
print(tokenizer.name_or_path, tokenizer(" a  b").input_ids, tokenizer.model_max_length)
"""


def test_a_hub_repository_with_a_sentencepiece_file_alone(spm: Path, tmp_path: Path) -> None:
    """From the hub's own cache, as after a download; transformers would convert it with other ids."""
    commit = "0" * 40
    repository = tmp_path / "models--somebody--llama"
    put(spm, repository / "snapshots" / commit / "tokenizer.model")
    (repository / "snapshots" / commit / "config.json").write_text('{"max_position_embeddings": 2048}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True)
    assert done.stdout == "somebody/llama [1, 29871, 263, 29871, 289] 2048\n", done.stderr
