"""Reads llama2.c's `tokenizer.bin`: the pieces of a SentencePiece BPE model, flattened for a C program.

Layout, little-endian (karpathy/llama2.c, `tokenizer.py`): int32 length of the longest piece; then per piece float32
score, int32 length, that many bytes. Spaces are spaces, not `▁`. Pieces 0 to 2 are `<unk>`, `\\n<s>\\n` and
`\\n</s>\\n`; pieces 3 to 258 stand for single bytes, written `<0x41>` (older files: the character itself).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.tokenizer.pieces import BYTE_PIECES, SPACE, Kind, Pieces

HEAD = ["<unk>", "\n<s>\n", "\n</s>\n"]
_RECORD = struct.Struct("<fi")
# The format has no magic number: a file that begins with `<unk>` as its first piece is one.
_FIRST = b"\x05\x00\x00\x00<unk>"


def is_llama2c(head: bytes) -> bool:
    """Whether a file that begins with `head` (at least 17 bytes) is a llama2.c tokenizer."""
    return head[8:17] == _FIRST


def read_llama2c(path: Path) -> Pieces:
    """The vocabulary in a `tokenizer.bin`; raises :class:`UserError` when the file is cut short or altered."""
    data = path.read_bytes()
    at = 4
    texts: list[str] = []
    scores: list[float] = []
    while at < len(data):
        if at + _RECORD.size > len(data):
            raise _damaged(path, f"it ends inside piece {len(texts)}")
        score, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        piece = data[at : at + max(length, 0)]
        if length <= 0 or not math.isfinite(score):
            raise _damaged(path, f"piece {len(texts)} has length {length} and score {score}")
        if len(piece) < length:
            raise _damaged(path, f"it ends inside piece {len(texts)}")
        try:
            texts.append(piece.decode())
        except UnicodeDecodeError as error:
            raise _damaged(path, f"piece {len(texts)} is not UTF-8: {piece!r}") from error
        scores.append(score)
        at += length
    return _interpret(path, texts, scores)


def _interpret(path: Path, texts: list[str], scores: list[float]) -> Pieces:
    if texts[:3] != HEAD:
        raise _damaged(path, f"it begins with {texts[:3]}, not with {HEAD}")
    given = texts[3:259]
    if given != BYTE_PIECES and given != [chr(value) for value in range(256)]:
        raise _damaged(path, "its pieces 3 to 258 are not the 256 bytes")
    ordinary = [text.replace(" ", SPACE) for text in texts[259:]]
    pieces = ["<unk>", "<s>", "</s>", *BYTE_PIECES, *ordinary]
    if len(set(pieces)) < len(pieces):
        twice = next(text for text in ordinary if pieces.count(text) > 1)
        raise _damaged(path, f"the piece {twice!r} stands in it twice")
    kinds = [Kind.UNKNOWN, Kind.CONTROL, Kind.CONTROL, *[Kind.BYTE] * 256, *[Kind.NORMAL] * len(ordinary)]
    return Pieces(pieces, scores, kinds, unknown=0, begin=1, end=2)


def _damaged(path: Path, said: str) -> UserError:
    return UserError(f"the llama2.c tokenizer {path} is damaged: {said}", hint="fetch it again, or export it again")
