"""Reads Llama 3's `tokenizer.model`: tiktoken ranks, one `base64 rank` a line, and the special tokens behind them.

Pattern, names and order of the special tokens are those of meta-llama/llama-models, `models/llama3/tokenizer.py`
(Llama 3.1 and later). Llama 3.0 had the same 256 ids, of which five were still called reserved: 128004
`<|finetune_right_pad_id|>`, 128005 `<|step_id|>`, 128008 `<|eom_id|>`, 128010 `<|python_tag|>` and 128011 `<|image|>`.
Its reserved tokens were therefore numbered otherwise; ids, which are what a model knows, did not move.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llama_ft.errors import UserError

RANKS = 128_000
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
]
SPECIAL = [*_NAMED, *(f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(_NAMED)))]
"""The 256 special tokens; the first has id 128000."""
NAMES = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Llama 3's 128,000 ranks.

    Raises :class:`UserError` with the line of the first damage, and for any other number of ranks: the special tokens
    stand right behind the ranks, so a file cut short would shift each of their ids.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        fields = line.split()
        try:
            token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        except (IndexError, ValueError, binascii.Error) as error:
            raise _damaged(path, f"line {number} is not `base64 rank`: {line[:60]!r}") from error
        if len(fields) > 2 or rank != number - 1 or not token or token in ranks:
            raise _damaged(path, f"line {number} should hold a new token and rank {number - 1}: {line[:60]!r}")
        ranks[token] = rank
    if len(ranks) != RANKS:
        raise UserError(
            f"{path} holds {len(ranks):,} tiktoken ranks; Llama 3's file holds {RANKS:,}",
            hint="fetch it again if it is Llama 3's (2,183,982 bytes); another model's needs its own pattern and "
            "special tokens: use its tokenizer.json",
        )
    if not all(bytes([value]) in ranks for value in range(256)):
        raise _damaged(path, "a byte has no rank")
    return ranks


def build_llama3(ranks: dict[bytes, int]) -> Tokenizer:
    """The byte-level BPE tokenizer of these ranks (transformers' converter: 2 s, most of it finding the merges).

    A word that is a token is taken whole (`ignore_merges`), as tiktoken does.
    """
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class FromRanks(TikTokenConverter):
        """Its own reader keeps a copy of every file it reads in a temporary folder."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: Any) -> dict[bytes, int]:
            return tiktoken_url

    return FromRanks(vocab_file=ranks, pattern=PATTERN, extra_special_tokens=SPECIAL).converted()


def _damaged(path: Path, said: str) -> UserError:
    return UserError(f"the tiktoken file {path} is damaged: {said}", hint="fetch it again")
