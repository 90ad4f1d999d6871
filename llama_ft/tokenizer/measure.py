"""How a tokenizer cuts texts, in numbers that different tokenizers share: per word, per byte, per character.

Tokens per word is called fertility (Rust et al., arXiv 2012.15613, section 3.2: subwords per word). A word is here what
stands between white space, so that the figure says little about languages that write none (Chinese, Japanese, Thai);
bytes per token says the same of all, and divides a loss per token into one per byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from llama_ft.tokenizer.text import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SPACE = "▁"


@dataclass
class Cut:
    """Counts over texts. `one_byte`: tokens that stand for a single byte, letters too; `broken`: tokens that hold a
    part of a character, so that they are no text by themselves; `unknown`: tokens that say nothing of their text;
    `used`: the ids that came up. Characters are Unicode code points, bytes UTF-8."""

    words: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    one_byte: int = 0
    broken: int = 0
    unknown: int = 0
    used: set[int] = field(default_factory=set)

    def add(self, other: Cut) -> None:
        """Adds another's counts."""
        for name in ("words", "characters", "bytes", "tokens", "one_byte", "broken", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.used |= other.used

    def figures(self, vocabulary: int) -> dict[str, float | int | None]:
        """The counts, and their ratios: None where there is nothing to divide by. `used` is a share of `vocabulary`."""
        counts = {name: getattr(self, name) for name in ("words", "characters", "bytes", "tokens")}
        return {
            **counts,
            "tokens_per_word": _ratio(self.tokens, self.words),
            "bytes_per_token": _ratio(self.bytes, self.tokens),
            "characters_per_token": _ratio(self.characters, self.tokens),
            "one_byte": _ratio(self.one_byte, self.tokens),
            "broken": _ratio(self.broken, self.tokens),
            "unknown": _ratio(self.unknown, self.tokens),
            "used": _ratio(len(self.used), vocabulary),
        }


class Cutter:
    """Counts how one tokenizer cuts texts, without BOS or EOS. `vocabulary`: its tokens, added ones included.

    A control token's name in a text is text, as in training (:class:`llama_ft.tokenizer.text.TextEncoder`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._encoder = TextEncoder(tokenizer, control)
        self._unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        self.vocabulary = len(tokenizer)
        # bool [largest id + 1]: tokens of one byte, and tokens whose bytes are no whole characters
        values = token_bytes(tokenizer.backend_tokenizer)
        self._one_byte, self._broken = (np.zeros(max(values) + 1, dtype=bool) for _ in range(2))
        for token, value in values.items():
            self._one_byte[token] = len(value) == 1
            self._broken[token] = not _is_text(value)

    def cut(self, text: str, starts: Sequence[int] = (0,)) -> list[Cut]:
        """The counts of the parts of a text that begin at the characters `starts`, ascending from 0.

        The text is cut as a whole. A token belongs to the part in which it begins.
        """
        (encoding,) = self._encoder.encode_sealed([text])
        ids = np.array(encoding.ids, dtype=np.int64)
        firsts = [0]
        if len(starts) > 1:
            begin = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
            firsts = [0, *np.searchsorted(begin, starts[1:]).tolist()]
        cuts = []
        for number, (start, first) in enumerate(zip(starts, firsts, strict=True)):
            last = number + 1 == len(starts)
            part = text[start:] if last else text[start : starts[number + 1]]
            own = ids[first:] if last else ids[first : firsts[number + 1]]
            cuts.append(
                Cut(
                    words=len(part.split()),
                    characters=len(part),
                    bytes=len(part.encode()),
                    tokens=len(own),
                    one_byte=int(self._one_byte[own].sum()),
                    broken=int(self._broken[own].sum()),
                    unknown=int((own == self._unknown).sum()),
                    used=set(np.unique(own).tolist()),
                )
            )
        return cuts


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def token_bytes(backend: Tokenizer) -> dict[int, bytes]:
    """Of each id the UTF-8 bytes it stands for, if it stands alone in the middle of a text."""
    state: dict[str, Any] = json.loads(backend.to_str())
    added = {token["id"] for token in state["added_tokens"]}
    byte_level = uses_byte_level(state["decoder"])
    fallback = bool(state["model"].get("byte_fallback"))
    found = {}
    for piece, token in backend.get_vocab().items():
        if token in added:
            found[token] = piece.encode()
        elif byte_level:
            # A byte-level vocabulary may hold pieces in other signs; nothing in a text becomes one.
            found[token] = bytes(value for char in piece if (value := BYTE_OF.get(char)) is not None)
        elif fallback and (byte := _BYTE_PIECE.fullmatch(piece)):
            found[token] = bytes.fromhex(byte[1])
        else:
            found[token] = piece.replace(SPACE, " ").encode()
    return found


def uses_byte_level(decoder: Any) -> bool:
    """Whether a tokenizer.json's `decoder` is that of a byte-level vocabulary."""
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(map(uses_byte_level, decoder.get("decoders", [])))


def _byte_signs() -> dict[str, int]:
    """The sign that byte-level vocabularies write for each byte (GPT-2, src/encoder.py): itself if it can be seen in
    Latin-1, else the next of the signs from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in seen]
    return {chr(value): value for value in seen} | {chr(256 + i): value for i, value in enumerate(others)}


BYTE_OF = _byte_signs()


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
