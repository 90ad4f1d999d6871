"""Writes the tokenizer that belongs to a checkpoint in Hugging Face's layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from llama_ft.errors import UserError
from llama_ft.files import write_json
from llama_ft.tokenizer.find import find_tokenizer, read_json
from llama_ft.tokenizer.load import ABSURD_LENGTH, FALLBACK_LENGTH, stated_context
from llama_ft.tokenizer.native import open_native
from llama_ft.tokenizer.recognise import kind_of
from llama_ft.tokenizer.settings import NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""A Hugging Face tokenizer's files."""
# Opens in transformers 4 and 5. `LlamaTokenizer` would build its own pre-tokenizer and drop the one that was written.
CLASS = "PreTrainedTokenizerFast"
# Roles that a bare tokenizer.json does not state, by the names that LLaMAs have given them.
_ROLES = [{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
          {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}]  # fmt: skip


def write_tokenizer(source: Path, dest: Path, *, vocab_size: int | None = None) -> Path | None:
    """Writes `source`'s tokenizer into the folder `dest`, so that plain `AutoTokenizer.from_pretrained(dest)` opens it.

    `source`: a checkpoint's folder, a checkpoint file (its tokenizer is looked for beside it, :func:`find_tokenizer`),
    or a tokenizer file: a tokenizer.json (copied with the files beside it), SentencePiece `.model`, Llama 3's tiktoken
    ranks, or llama2.c's tokenizer.bin. Which it is, is seen from the content. `vocab_size`: rows of the model's
    embedding, which the vocabulary must not outgrow. `model_max_length` is the context in a config.json in `dest`, or
    beside the tokenizer; write the config first.

    A SentencePiece file is also copied as tokenizer.model: llama.cpp's converter takes the scores from it.

    Returns the file it was made from, None when `source` has no tokenizer. Raises :class:`UserError` when the tokenizer
    is damaged, not convertible exactly, larger than the model, or not to be told from others.
    """
    file = find_tokenizer(source, vocab_size)
    if file is None:
        return None
    dest.mkdir(parents=True, exist_ok=True)
    kind = kind_of(file)
    if kind == "huggingface":
        backend = read_json(file)
        _fits(file, backend, vocab_size)
        _copy(file, backend, dest)
        return file
    tokenizer = open_native(file)
    _fits(file, tokenizer.backend_tokenizer, vocab_size)
    tokenizer.backend_tokenizer.save(str(dest / "tokenizer.json"))
    config = _config(tokenizer, _length(tokenizer, file, dest))
    if kind != "tiktoken":
        config["legacy"] = False
    write_json(dest / "tokenizer_config.json", config)
    if kind == "sentencepiece" and file.resolve() != (dest / "tokenizer.model").resolve():
        shutil.copyfile(file, dest / "tokenizer.model")
    return file


def _fits(file: Path, backend: Tokenizer, vocab_size: int | None) -> None:
    # Added tokens do not count: well-known mirrors of Llama 2 add a padding token that the embedding has no row for.
    pieces = backend.get_vocab_size(with_added_tokens=False)
    if vocab_size is not None and pieces > vocab_size:
        raise UserError(
            f"the tokenizer {file} has {pieces:,} pieces, but the model's embedding has {vocab_size:,} rows",
            hint="it belongs to another model",
        )


def _length(tokenizer: PreTrainedTokenizerFast, file: Path, dest: Path) -> int:
    stated = tokenizer.model_max_length
    own = stated if stated and stated <= ABSURD_LENGTH else None
    return stated_context(dest) or stated_context(file.parent) or own or FALLBACK_LENGTH


def _config(tokenizer: PreTrainedTokenizerFast, length: int) -> dict[str, Any]:
    config = {
        "tokenizer_class": CLASS,
        "add_bos_token": tokenizer.add_bos_token,
        "add_eos_token": tokenizer.add_eos_token,
        **{name: getattr(tokenizer, name) for name in NAMES if getattr(tokenizer, name)},
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
    return config


def _copy(file: Path, backend: Tokenizer, dest: Path) -> None:
    folder = file.parent
    if folder.resolve() == dest.resolve():
        return
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, dest / name)
    named = folder / "additional_chat_templates"
    if named.is_dir():
        shutil.copytree(named, dest / named.name, dirs_exist_ok=True)
    if not (folder / "tokenizer_config.json").is_file():
        # With no class named, transformers takes LlamaTokenizer for any tokenizer.json beside a LLaMA's config.json.
        tokens = backend.get_vocab()
        roles = next((roles for roles in _ROLES if set(roles.values()) <= tokens.keys()), {})
        length = stated_context(dest) or stated_context(folder) or FALLBACK_LENGTH
        config = {"tokenizer_class": CLASS, **roles, "model_max_length": length, "clean_up_tokenization_spaces": False}
        write_json(dest / "tokenizer_config.json", config)
