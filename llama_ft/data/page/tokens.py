"""Tokens as HTML: a document, or a pair side by side.

Neighbouring tokens of one kind share an element (a *run*), so that a long document is a few hundred elements. Its
`data-t` says where the tokens lie, `length:id` each, lengths in UTF-16 units as scripts count; page.js cuts a run into
tokens when it comes into view. Without a script the page still reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_ft.data.page.write import PageDocument

Token = tuple[str, bool, bool]
"""Its text, carries loss, is the end token."""

LONG = 300
"""Tokens from which on a document is folded."""

_LOOSE = re.compile(r" (?= |\n|$)")  # every space but a single one before something else, which needs no sign
# Control characters, bidi marks, spaces that look like others or like nothing, soft hyphens, carriers of hidden text
# (tags, variation selectors beyond the first 16) and lone surrogates, which no file can hold. The zero-width joiners
# 200C and 200D and the selectors FE00-FE0F belong to words and emoji.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\xa0\xad\u061c\u2000-\u200b\u200e\u200f\u2028-\u202f\u205f-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e0fff]"
)
_SIGNS = {"\n": "↵\n", "\t": "→\t"}


def visible(text: str) -> str:
    """`text` with newlines, tabs, loose spaces and all characters that would not show or would move others as signs."""
    if text.isascii() and text.isprintable() and "  " not in text and not text.endswith(" "):
        return text
    return _LOOSE.sub("·", _UNSEEN.sub(_sign, text))


def _sign(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _SIGNS.get(match[0]) or (f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def safe(text: object) -> str:
    """Any text as HTML, in an element or between quotes, with nothing in it that could move its surroundings."""
    return escape(_UNSEEN.sub(_sign, str(text)))


def plural(number: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def document_html(document: PageDocument, source: int, labels: dict[str, str]) -> str:
    """One document with its head. `source` is the set's number, for the filter; `labels` its short name per label."""
    marks = [("dropped", document.dropped or ""), ("truncated", "truncated" if document.truncated else "")]
    part = f", part {document.part}" if document.part else ""
    refusal = f'<p class="refusal">{safe(document.refusal)}</p>' if document.refusal else ""
    flags = "".join(f' <span class="flag {name}">{safe(text)}</span>' for name, text in marks if text)
    body = _pair(document) if document.rejected is not None else _body(document.tokens, document.ids, document)
    pieces = [token[0] for token in [*document.tokens, *(document.rejected or [])]]
    long = len(pieces) > LONG or sum(map(len, pieces)) > 10 * LONG
    return (
        f'<article class="document{" long" if long else ""}" data-source="{source}"'
        f"{' data-truncated' if document.truncated else ''}>"
        f"<header><h4>row {document.row}{part} <small>of {safe(labels[document.source])}</small></h4>"
        f"<p>{_counts(document)}{flags}</p></header>{refusal}{body}</article>\n"
    )


def _pair(document: PageDocument) -> str:
    """What both answers share once, then the two ends beside each other."""
    better, worse, shared = document.tokens, document.rejected or [], document.shared
    prompt = _body(better[:shared], document.ids[:shared], document) if shared else ""
    sides = "".join(
        f"<section><h5>{name}</h5>{_body(tokens[shared:], ids[shared:], document, start=shared, name=name)}</section>"
        for name, tokens, ids in (("chosen", better, document.ids), ("rejected", worse, document.rejected_ids))
    )
    return f'{prompt}<div class="pair">{sides}</div>'


def _body(
    tokens: Sequence[Token], ids: Sequence[int], document: PageDocument, *, start: int = 0, name: str = ""
) -> str:
    if not tokens:
        return '<p class="empty">no text</p>'
    if not document.ids:  # dropped before it was tokenised: its text alone
        return f'<div class="tokens fold raw" dir="auto">{escape("".join(visible(token[0]) for token in tokens))}</div>'
    return runs(tokens, ids, f"{where_of(document)} {name}".strip(), start=start)


def where_of(document: PageDocument) -> str:
    """A document's name inside its set."""
    return f"row {document.row}"


def runs(
    tokens: Iterable[Token],
    ids: Sequence[int],
    where: str,
    *,
    start: int = 0,
    place: int | None = None,
    inline: bool = False,
) -> str:
    """Tokens from position `start` of a document, which begins at `place` of its pack."""
    parts, at = [], 0
    for (loss, end), run in groupby(tokens, key=lambda token: token[1:]):
        pieces = [visible(token[0]) for token in run]
        numbers = [*map(str, ids[at : at + len(pieces)]), *[""] * len(pieces)]  # ids may be unknown
        at += len(pieces)
        spans = " ".join(f"{_units(piece)}:{number}" for piece, number in zip(pieces, numbers, strict=False))
        tag, name = ("mark", ' class="end"' if end else "") if loss else ("span", "")
        parts.append(f'<{tag}{name} data-t="{spans}">{escape("".join(pieces))}</{tag}>')
    tag, kind = ("span", "tokens") if inline else ("div", "tokens fold")
    packed = "" if place is None else f' data-place="{place}"'
    return (
        f'<{tag} class="{kind}" data-from="{start}"{packed} tabindex="0" role="group" dir="auto" '
        f'aria-label="Tokens of {safe(where)}; arrow keys step through them">{"".join(parts)}</{tag}>'
    )


def _units(piece: str) -> int:
    return len(piece) if piece.isascii() else len(piece.encode("utf-16-le")) // 2


def _counts(document: PageDocument) -> str:
    if not document.ids:
        return "not tokenised"
    if document.rejected is not None:
        better, worse = (sum(loss for _, loss, _ in tokens) for tokens in (document.tokens, document.rejected))
        return (
            f"chosen {plural(len(document.tokens), 'token')}, {better:,} with loss; "
            f"rejected {plural(len(document.rejected), 'token')}, {worse:,} with loss; {document.shared:,} for both"
        )
    labelled = sum(loss for _, loss, _ in document.tokens)
    return f"{plural(len(document.ids), 'token')}, {labelled:,} with loss"
