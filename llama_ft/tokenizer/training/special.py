"""Control tokens of a new tokenizer: which it has, and which a user may add."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llama_ft.errors import Problem, UserError

BYTES = 256
"""Pieces that every tokenizer made here has: one for each byte, so that no text is unknown."""
# A letter run ends a word, so that a bracket behind it is never part of a learnt piece: such a name is no text's piece.
_FORM = re.compile(r"<[^\s<>]*[^\W_][^\s<>]*>|\[[^\s\[\]]*[^\W_][^\s\[\]]*\]")


def is_control_name(name: str) -> bool:
    """Whether a name is a control token's by its form: `<name>`, `<|name|>`, `[NAME]`, without spaces."""
    return _FORM.fullmatch(name) is not None


def check_special(special: Sequence[str], own: Sequence[str]) -> None:
    """Raises :class:`UserError` with every name in `special` that is no control token's, or comes twice.

    `own`: the names that the tokenizer has anyway. A name is `<name>`, `<|name|>` or `[NAME]`, without spaces: anything
    else could be learnt from the text as an ordinary piece, which would then be a control token wherever it occurs.
    """
    problems = []
    for number, name in enumerate(special):
        if not is_control_name(name):
            hint = "write <name>, <|name|> or [NAME], without spaces"
            problems.append(Problem(f"{name!r} is no name of a control token", key="special", hint=hint))
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            problems.append(Problem(f"{name!r} is the piece of a byte", key="special", hint="take another name"))
        elif name in own:
            problems.append(Problem(f"{name!r} is there anyway", key="special", hint="leave it out"))
        elif name in special[:number]:
            problems.append(Problem(f"{name!r} is named twice", key="special", hint="name it once"))
    if problems:
        raise UserError(problems)


def check_size(vocab_size: int, special: int) -> None:
    """Raises :class:`UserError` unless there is room for the bytes, `special` control tokens and one learnt piece."""
    least = BYTES + special + 1
    if vocab_size < least:
        what = f"a vocabulary of {vocab_size:,} has no room for {BYTES} bytes, {special} control tokens and a piece"
        raise UserError(what, key="vocab-size", hint=f"at least {least}; usual are 4,096 to 128,000")


def too_little(found: int, asked: int, special: int) -> UserError:
    """The error for a text that has fewer pieces in it than were asked for."""
    if found <= BYTES + special:
        return UserError(
            "there is nothing to learn from this text: no two signs stand together twice", hint="more text"
        )
    what = f"the text gives {found:,} pieces, {asked:,} were asked for"
    return UserError(what, key="vocab-size", hint=f"more text, or --vocab-size {found}")
