"""Opens a tokenizer file that is not Hugging Face's own as a fast tokenizer, in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from llama_ft.tokenizer.from_llama2c import read_llama2c
from llama_ft.tokenizer.from_sentencepiece import read_sentencepiece
from llama_ft.tokenizer.from_tiktoken import NAMES, build_llama3, read_ranks
from llama_ft.tokenizer.recognise import known_kind
from llama_ft.tokenizer.settings import Settings, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_native(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a SentencePiece, tiktoken or llama2.c file, with the settings of the JSON files beside it.

    A text begins with BOS and gets no EOS, unless a tokenizer_config.json beside it says otherwise. Padding and
    `model_max_length` are what those files say: mostly none. Raises :class:`UserError` when a file is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    settings = read_settings(file.parent) if file.name == "tokenizer.model" else Settings()
    backend, names = _build(file)
    settings.extend(backend, file.parent)
    options: dict[str, Any] = {**names, **settings.names}
    if settings.max_length is not None:
        options["model_max_length"] = settings.max_length
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=settings.add_bos,
        add_eos_token=settings.add_eos,
        clean_up_tokenization_spaces=False,
        **options,
    )
    tokenizer.chat_template = settings.chat_template
    return tokenizer


def _build(file: Path) -> tuple[Tokenizer, dict[str, str]]:
    kind = known_kind(file)
    if kind == "tiktoken":
        return build_llama3(read_ranks(file)), NAMES
    pieces = read_llama2c(file) if kind == "llama2c" else read_sentencepiece(file)
    if tied := pieces.ties():
        warnings.warn(
            f"{file}: {tied:,} pieces share their score with another; where such pieces overlap in a text, "
            "SentencePiece takes the leftmost and this tokenizer the one with the lower id",
            stacklevel=3,
        )
    return pieces.build(), pieces.names()
