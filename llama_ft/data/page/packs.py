"""The documents of a pack as HTML, end to end: where each begins, drawn to scale and in numbers, then their tokens.

A preference pair lies there as it is computed: what both answers share once, then the two ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from llama_ft.data.page.tokens import LONG, Token, plural, runs, safe, where_of

if TYPE_CHECKING:
    from llama_ft.data.page.write import PageDocument

_ALONE = "Documents of a micro-batch lie end to end. None sees another; positions begin again at 0 with each."
_PAIRS = (
    "Pairs of a micro-batch lie end to end: what both answers begin with once, then the rest of each. An answer sees "
    "that part and itself; its positions go on where that part stops."
)


class _Segment(NamedTuple):
    """Tokens of a pack that see one another, and those of segment `sees`; the first has position `start`."""

    document: PageDocument
    name: str
    tokens: Sequence[Token]
    ids: Sequence[int]
    start: int = 0
    sees: int = -1


def packs_html(packs: Sequence[Sequence[PageDocument]], labels: dict[str, str]) -> tuple[str, str]:
    """What is to be said of the packs, and the packs. `labels`: the short name of each set's label."""
    pairs = any(document.rejected is not None for pack in packs for document in pack)
    return _PAIRS if pairs else _ALONE, "".join(_pack(i, pack, labels) for i, pack in enumerate(packs, 1))


def _pack(number: int, documents: Sequence[PageDocument], labels: dict[str, str]) -> str:
    segments: list[_Segment] = []
    for document in documents:
        segments += _segments(document, len(segments))
    lengths = [len(one.ids) for one in segments]
    places = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    scale = 1000 / max(places[-1], 1)
    bars = "".join(_bars(one, place, scale) for one, place in zip(segments, places, strict=False))
    flow = []
    for i, (one, place) in enumerate(zip(segments, places, strict=False), 1):
        what = f"row {one.document.row} of {safe(labels[one.document.source])}{one.name and f', {one.name}'}"
        what += f", positions {one.start}–{one.start + len(one.ids) - 1}"
        where = f"{where_of(one.document)} {one.name}".strip()
        tokens = runs(one.tokens, one.ids, where, start=one.start, place=place, inline=True)
        flow.append(f'<span class="edge"><b>{i}</b> {what}</span>{tokens}')
    numbers = _numbers("cu_seqlens", places)
    kind = "document"
    if any(document.rejected is not None for document in documents):
        numbers, kind = numbers + _numbers("shared", [one.sees for one in segments]), "pair"
    return (
        f'<article class="pack{" long" if places[-1] > LONG else ""}">'
        f"<header><h3>Pack {number}</h3>"
        f"<p>{plural(len(documents), kind)}, {plural(places[-1], 'token')}</p></header>"
        f'<svg class="ribbon" viewBox="0 0 1000 18" preserveAspectRatio="none" role="img" '
        f'aria-label="Pack {number} to scale: where its {kind}s begin, and where they carry loss">{bars}</svg>'
        f'{numbers}<div class="flow fold" dir="auto">{"".join(flow)}</div></article>\n'
    )


def _numbers(name: str, numbers: Sequence[int]) -> str:
    return f'<p class="starts"><code>{name}</code> {", ".join(map(str, numbers))}</p>'


def _segments(document: PageDocument, number: int) -> Iterator[_Segment]:
    """The segments of a document; `number` is that of its first one."""
    if document.rejected is None:
        yield _Segment(document, "", document.tokens, document.ids)
        return
    shared = document.shared
    if shared:
        yield _Segment(document, "prompt", document.tokens[:shared], document.ids[:shared])
    sees = number if shared else -1
    yield _Segment(document, "chosen", document.tokens[shared:], document.ids[shared:], shared, sees)
    yield _Segment(document, "rejected", document.rejected[shared:], document.rejected_ids[shared:], shared, sees)


def _bars(segment: _Segment, place: int, scale: float) -> str:
    """A segment in the drawing: a line where it begins, and its stretches with and without loss."""
    parts, at = [], place
    for loss, run in groupby(segment.tokens, key=lambda token: token[1]):
        length = len(list(run))
        box = f'x="{at * scale:.2f}" y="4" width="{length * scale:.2f}" height="14"'
        parts.append(f'<rect class="{"loss" if loss else "context"}" {box}/>')
        at += length
    parts.append(f'<path d="M{place * scale:.2f} 0V18"/>')
    name = f", {segment.name}" if segment.name else ""
    words = f"row {segment.document.row}{name}: {plural(len(segment.ids), 'token')}"
    return f"<g><title>{words}</title>{''.join(parts)}</g>"
