"""More tokens for a tokenizer that a model knows already: none of its ids moves.

Two ways, for two purposes:

- **Pieces of another tokenizer**, trained on the text to come. A BPE tokenizer applies its merges in their order, so
  merges put behind all others act only where the old ones have nothing left to join: a text is cut as before, then some
  neighbours become one. A piece is taken if it lacks one merge to be a piece here too, in the order in which the other
  tokenizer learnt them. Every new token is therefore a run of old ones, in any text, and where no new one occurs
  nothing changes. Vocabularies that disagree about a piece's parts are thus not merged in full: such pieces are passed
  over, and counted.
- **Named tokens**, `<tool_call>` or `aspirin`: added tokens, which are found anywhere in a text, inside longer words
  too, before it is cut into words at all. A space before one stays a token of its own.

`Grown.parts` says which old tokens each new one stood for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_ft.errors import Problem, UserError
from llama_ft.tokenizer.measure import BYTE_OF, SPACE, token_bytes, uses_byte_level
from llama_ft.tokenizer.training.special import is_control_name

_SIGN_OF = {value: sign for sign, value in BYTE_OF.items()}


@dataclass(frozen=True)
class Grown:
    """A tokenizer with more tokens. `parts`: of each new id, the ids of the old tokens that it stands for, in order.

    `passed_over`: pieces of the other tokenizer that are no one merge away from those here.
    """

    backend: Tokenizer
    parts: dict[int, list[int]]
    passed_over: int = 0


def add_names(backend: Tokenizer, names: Sequence[str]) -> Grown:
    """Adds named tokens behind all ids: control tokens where a name is one's (`<x>`, `[X]`), else words of the text.

    Raises :class:`UserError` with every name that is empty, there already, or named twice.
    """
    problems = []
    if not names:
        problems.append(Problem("no token is named", key="tokens", hint='--tokens "<a>,<b>", or a file of one a line'))
    for number, name in enumerate(names):
        known = backend.token_to_id(name)
        if not name.strip():
            problems.append(Problem(f"token {number} is empty", key="tokens", hint="remove it"))
        elif known is not None:
            problems.append(Problem(f"{name!r} is there already, id {known}", key="tokens", hint="remove it"))
        elif name in names[:number]:
            problems.append(Problem(f"{name!r} is named twice", key="tokens", hint="name it once"))
    if problems:
        raise UserError(problems)
    parts = [backend.encode(name, add_special_tokens=False).ids for name in names]
    grown = Tokenizer.from_str(backend.to_str())
    added = [AddedToken(name, normalized=False, special=is_control_name(name)) for name in names]
    grown.add_tokens(added)
    ids = grown.get_vocab()
    return Grown(grown, {ids[name]: old for name, old in zip(names, parts, strict=True)})


def add_pieces(backend: Tokenizer, other: Tokenizer, count: int) -> Grown:
    """Adds the first `count` pieces of `other` that are one merge away, as the module says.

    Raises :class:`UserError` when either is no BPE tokenizer, or `other` has fewer such pieces.
    """
    vocabulary = _Vocabulary(backend)
    candidates = _learnt(other)
    taken: dict[str, tuple[list[str], tuple[str, str] | None]] = {}
    passed_over = 0
    for value in candidates:
        if len(taken) == count:
            break
        piece = vocabulary.spelt(value)
        if piece is None or piece in vocabulary.ids:
            continue
        last = vocabulary.cut(piece)
        alone = len(piece) == 1 and vocabulary.falls_back
        joined = len(last) == 2 and all(map(vocabulary.holds, last)) and vocabulary.stays_whole(value)
        if not alone and not joined:
            passed_over += 1
            continue
        taken[piece] = (vocabulary.old_parts(piece), None if alone else (last[0], last[1]))
        vocabulary.add(piece, taken[piece][1])
    if len(taken) < count:
        what = (
            f"the other tokenizer has {len(taken):,} pieces that the base's lacks and could join, {count:,} are asked"
        )
        raise UserError(what, key="add", hint=f"--add {len(taken)}, or train it larger" if taken else "train it larger")
    grown = vocabulary.written()
    parts = {vocabulary.ids[piece]: [vocabulary.ids[part] for part in old] for piece, (old, _) in taken.items()}
    return Grown(grown, parts, passed_over)


class _Vocabulary:
    """A BPE tokenizer's pieces and merges, to look up and to add to. `ids` has added tokens too."""

    def __init__(self, backend: Tokenizer):
        self._state: dict[str, Any] = json.loads(backend.to_str())
        self._model = self._state["model"]
        _check_bpe(self._model, "the base's tokenizer")
        self._backend = backend
        self.byte_level = uses_byte_level(self._state["decoder"])
        self.falls_back = bool(self._model.get("byte_fallback"))
        self.ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._pieces = set(self._model["vocab"])
        self._ranks = {_pair(merge): rank for rank, merge in enumerate(self._model["merges"])}
        self._old = self._next = len(self._model["merges"])
        self._first = max(self.ids.values()) + 1
        self._new: dict[str, None] = {}

    def spelt(self, value: bytes) -> str | None:
        """A piece as this vocabulary writes it; None where it cannot."""
        if self.byte_level:
            return "".join(_SIGN_OF[byte] for byte in value)
        try:
            return value.decode().replace(" ", SPACE)
        except UnicodeDecodeError:
            return None

    def cut(self, piece: str, before: int | None = None) -> list[str]:
        """The pieces of a word, by merges of ranks below `before` (None: all)."""
        parts = list(piece)
        while len(parts) > 1:
            ranked = [(self._ranks.get(pair, before), at) for at, pair in enumerate(pairwise(parts))]
            found = [(rank, at) for rank, at in ranked if rank is not None and (before is None or rank < before)]
            if not found:
                break
            _, at = min(found)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return parts

    def old_parts(self, piece: str) -> list[str]:
        """The same by the old merges alone; a character without a piece in its bytes."""
        return [one for part in self.cut(piece, self._old) for one in self._fallen_back(part)]

    def _fallen_back(self, part: str) -> list[str]:
        if part in self._pieces and part not in self._new:
            return [part]
        return [f"<0x{byte:02X}>" for byte in part.encode()]

    def holds(self, part: str) -> bool:
        """Whether a part is a piece, and not a character that falls back to its bytes."""
        return part in self._pieces

    def stays_whole(self, value: bytes) -> bool:
        """Whether a text leaves these bytes in one word; bytes that are no text are parts of one character or two."""
        try:
            text = value.decode()
        except UnicodeDecodeError:
            return True
        if not self.byte_level:
            return True
        normalizer, cutter = self._backend.normalizer, self._backend.pre_tokenizer
        if normalizer is not None and normalizer.normalize_str(text) != text:
            return False
        return cutter is None or len(cutter.pre_tokenize_str(text)) == 1

    def add(self, piece: str, merge: tuple[str, str] | None) -> None:
        """Gives a piece the next id, and the last place among the merges."""
        self.ids[piece] = self._first + len(self._new)
        self._pieces.add(piece)
        self._new[piece] = None
        if merge is not None:
            self._ranks[merge] = self._next
            self._next += 1

    def written(self) -> Tokenizer:
        """The tokenizer with what was added."""
        model = self._model
        for token in self._state["added_tokens"]:
            # Outside the vocabulary an added token is numbered behind it, however long that grows; inside it stays.
            model["vocab"].setdefault(token["content"], token["id"])
        model["vocab"] |= {piece: self.ids[piece] for piece in self._new}
        model["merges"] = [list(pair) for pair in sorted(self._ranks, key=self._ranks.__getitem__)]
        grown = Tokenizer.from_str(json.dumps(self._state))
        moved = [name for name, token in self.ids.items() if grown.token_to_id(name) != token]
        if moved or grown.get_vocab_size() != len(self.ids):
            raise RuntimeError(f"{len(moved)} tokens moved, {moved[:3]}")
        return grown


def _learnt(other: Tokenizer) -> list[bytes]:
    """What a BPE tokenizer learnt, in order of its ids: pieces of more than one byte, control tokens left out.

    SentencePiece numbers its characters last, and makes its pieces of them: here each comes before the first piece
    that has it.
    """
    state = json.loads(other.to_str())
    _check_bpe(state["model"], "the other tokenizer")
    added = {token["id"] for token in state["added_tokens"]}
    values = token_bytes(other)
    learnt = [values[token] for token in sorted(values) if token not in added and len(values[token]) > 1]
    if uses_byte_level(state["decoder"]):
        return learnt
    known = set(learnt)
    parts = (one for value in learnt for one in (*(char.encode() for char in value.decode(errors="ignore")), value))
    return [value for value in dict.fromkeys(parts) if value in known]


def _check_bpe(model: dict[str, Any], whose: str) -> None:
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)]
    if model.get("type") != "BPE" or odd:
        kind = f"BPE with {odd[0]}" if odd else model.get("type")
        raise UserError(f"{whose} is {kind}, plain BPE is needed", hint="name its tokens instead: --tokens")


def _pair(merge: Any) -> tuple[str, str]:
    """Both forms that tokenizer.json has for a merge."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
