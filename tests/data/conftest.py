"""A small real tokenizer, made in a moment, and recipes on it with a cache of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llama_ft.recipe.schema import Recipe
from llama_ft.tokenizer.load import load_tokenizer

CORPUS = "The llama eats grass. What does a llama eat? Write a response to the instruction. Answer yes or no: " * 3
Rows = list[dict[str, Any]]


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 pieces with ChatML's control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    folder = tmp_path_factory.mktemp("mini")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mini_tokenizer(mini: Path) -> PreTrainedTokenizerFast:
    """That tokenizer, through the door."""
    return load_tokenizer(mini)


@pytest.fixture(scope="session")
def llama2(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-2's SentencePiece tokenizer in a folder, as Meta ships it."""
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(real_data / "tokenizers" / "llama2_tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test alone; its `prepared` folder."""
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


@pytest.fixture
def make_recipe(mini: Path, cache: Path) -> Callable[..., Recipe]:
    """Builds a recipe on the small tokenizer: `make_recipe(path, layout="messages", template="chatml", …)`."""

    def build(path: Path | None = None, *, layout: str = "messages", **changes: Any) -> Recipe:
        fields: dict[str, Any] = {
            "name": "test",
            "model": {"base": str(mini), "tokenizer": str(mini)},
            "data": [{"path": str(path), "layout": layout}],
            "template": "chatml",
        }
        return Recipe.model_validate({**fields, **changes})

    return build


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """One JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A messages row: user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": [*([{"role": "system", "content": system}] if system is not None else []), *messages]}


def chats(number: int) -> Rows:
    """Distinct short conversations of two turns."""
    return [chat(f"What does llama {i} eat?", f"Grass {i}.") for i in range(number)]
