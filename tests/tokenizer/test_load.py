"""What the tokenizer door guarantees, on SmolLM2's and Llama-2's real vocabularies and on damaged folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_ft.errors import UserError
from llama_ft.tokenizer.load import begins_with_bos, load_tokenizer, settle_pad


def make(folder: Path, specials: list[str], **names: str) -> Path:
    """A word-level tokenizer that knows `a` and the given special tokens."""
    vocabulary = {token: i for i, token in enumerate([*specials, "a"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(specials)
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return folder


@pytest.fixture
def llama2(real_data: Path, tmp_path: Path) -> Path:
    """A folder as Meta ships it: nothing but the SentencePiece model."""
    folder = tmp_path / "llama-2"
    folder.mkdir()
    shutil.copyfile(real_data / "tokenizers" / "llama2_tokenizer.model", folder / "tokenizer.model")
    return folder


def test_smollm2_pads_with_endoftext_and_has_no_bos(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id == 0
    assert tokenizer.eos_token_id == 2
    # The file names <|im_start|> as BOS, which the tokenizer never adds: a template must not write it either.
    assert tokenizer.bos_token is None and not begins_with_bos(tokenizer)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.padding_side == "right"


def test_llama2_keeps_its_bos_and_pads_with_unk(llama2: Path) -> None:
    tokenizer = load_tokenizer(llama2)
    assert tokenizer.is_fast
    assert begins_with_bos(tokenizer) and tokenizer.bos_token == "<s>"
    assert tokenizer.pad_token == "<unk>" and tokenizer.pad_token_id == 0
    assert tokenizer("Hello world").input_ids == [1, 15043, 3186]
    assert tokenizer.model_max_length == 131_072  # the file states none
    assert tokenizer.padding_side == "right"


def test_absent_bos_survives_saving(smollm2: Path, tmp_path: Path) -> None:
    load_tokenizer(smollm2).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.bos_token is None and again.pad_token == "<|endoftext|>"


def test_a_sound_pad_token_is_kept(tmp_path: Path) -> None:
    folder = make(tmp_path, ["<unk>", "<end>", "<mine>"], eos_token="<end>", pad_token="<mine>", unk_token="<unk>")
    assert load_tokenizer(folder).pad_token == "<mine>"


@pytest.mark.parametrize("pad", [{}, {"pad_token": "<end>"}])
def test_pad_is_never_eos(tmp_path: Path, pad: dict[str, str]) -> None:
    folder = make(tmp_path, ["<unk>", "<end>", "<pad>"], eos_token="<end>", unk_token="<unk>", **pad)
    assert load_tokenizer(folder).pad_token == "<pad>"


def test_pad_is_never_the_templates_end_token(tmp_path: Path) -> None:
    folder = make(tmp_path, ["<unk>", "<end>", "<|turn|>"], eos_token="<end>", unk_token="<unk>", pad_token="<|turn|>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token == "<|turn|>"
    settle_pad(tokenizer, "x", end=tokenizer.convert_tokens_to_ids("<|turn|>"))
    assert tokenizer.pad_token == "<unk>"


def test_no_token_free_for_padding(tmp_path: Path) -> None:
    folder = make(tmp_path, ["<end>"], eos_token="<end>", pad_token="<end>")
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "no usable padding token: it is '<end>', its end token" in str(caught.value)


def test_context_comes_from_the_config_beside_it(tmp_path: Path) -> None:
    folder = make(tmp_path, ["<unk>", "<end>"], eos_token="<end>", unk_token="<unk>")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 777}))
    assert load_tokenizer(folder).model_max_length == 777


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./no-such/folder", "no such tokenizer folder: ./no-such/folder"),
        ("/no/such", "no such tokenizer folder: /no/such"),
        ("a/b/c", "no such tokenizer folder: a/b/c"),
        ("what is this?", "'what is this?' is neither a folder nor a hub id (owner/name)"),
        ("nobody/nothing", "the tokenizer 'nobody/nothing' is not on this machine and HF_HUB_OFFLINE is set"),
    ],
)
def test_unknown_sources(source: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(source)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].what == said


def test_near_folder_is_named(tmp_path: Path) -> None:
    make(tmp_path / "my-tokenizer", ["<unk>", "<end>"], eos_token="<end>", unk_token="<unk>")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "my-tokeniser")
    assert caught.value.problems[0].hint == "did you mean 'my-tokenizer'?"


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.problems[0].what == f"{tmp_path} holds no tokenizer"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_damaged_tokenizer_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert f"the tokenizer in {tmp_path} cannot be read" in str(caught.value)
