"""`llama-ft preview --html`: a preparation as one HTML file that a browser opens from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.data.documents import OVERLONG
from llama_ft.data.page.counts import counts_html, faults_html, reason_html, reasons, summary
from llama_ft.data.page.lengths import Beyond, lengths_html
from llama_ft.data.page.packs import packs_html
from llama_ft.data.page.shell import whole_page
from llama_ft.data.page.tokens import Token, document_html, plural, safe
from llama_ft.data.render import MASKED
from llama_ft.errors import UserError

if TYPE_CHECKING:
    from llama_ft.data.documents import Document
    from llama_ft.data.report import Report

HERE = Path(__file__).parent


@dataclass
class PageDocument:
    """One document to show. `tokens` are (its text, carries loss, is the end token), as many as `ids`.

    A row that was dropped before it was tokenised has no ids, and its text as the one token. `rejected`: of a
    preference pair, the prompt with the worse answer beside that with the better one, and `shared` the tokens at the
    start that are computed once for both. `part` counts the parts of a split row, `refusal` is what the template said
    when it refused the row.
    """

    source: str
    row: int
    tokens: list[Token]
    dropped: str | None
    truncated: bool
    rejected: list[Token] | None
    ids: list[int]
    rejected_ids: list[int] = field(default_factory=list)
    shared: int = 0
    part: int = 0
    refusal: str | None = None


@dataclass
class PageView:
    """What a page shows. `packs`: documents of a micro-batch, end to end; `lengths`: per set, of its kept documents.

    A pair's length is that of the longer of its two documents, which max_length bounds.
    """

    recipe_name: str
    template: str
    max_length: int
    report: Report
    documents: list[PageDocument]
    dropped: list[PageDocument]
    packs: list[list[PageDocument]]
    lengths: dict[str, list[int]]
    end_token_id: int | None


TOO_LONG = (OVERLONG, "one exchange longer than max_length")
Decode = Callable[[int], Any]


def page_document(
    document: Document, source_label: str, end_token_id: int | None, decode: Decode | None = None
) -> PageDocument:
    """A document of the data path, ready for a page; of a pair, both answers.

    `decode` gives the text of a token that lies nowhere in the document's text: infilling puts text into an order of
    its own.
    """
    rejected: Any = getattr(document, "rejected", None)
    return PageDocument(
        source=source_label,
        row=document.row,
        tokens=_tokens(document, end_token_id, decode),
        dropped=document.dropped,
        truncated=document.truncated,
        rejected=None if rejected is None else _tokens(rejected, end_token_id, decode),
        ids=document.ids.tolist(),
        rejected_ids=[] if rejected is None else rejected.ids.tolist(),
        shared=0 if rejected is None else document.shared,
        part=getattr(document, "part", 0),
        refusal=getattr(document, "refusal", None),
    )


def _tokens(document: Any, end_token_id: int | None, decode: Decode | None) -> list[Token]:
    if not len(document.ids):
        return [(document.text, False, False)] if document.text else []
    tokens, done = [], 0
    labels, ids = document.labels.tolist(), document.ids.tolist()
    for i, (start, end) in enumerate(document.offsets):
        piece = document.text[max(start, done) : end]  # bytes of one character share its offsets
        if start == end and decode is not None:
            piece = str(decode(ids[i]))
        done = max(done, end)
        loss = i > 0 and labels[i] != MASKED  # nothing predicts a document's first token
        tokens.append((piece, loss, loss and ids[i] == end_token_id))
    return tokens


def write_page(path: Path, view: PageView) -> None:
    """Writes the page; raises :class:`UserError` if the file cannot be written."""
    try:
        path.write_text(_page(view), encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"the page cannot be written: {error.strerror or error}", where=str(path)) from error


def _page(view: PageView) -> str:
    names = short_names(
        [*(one.label for one in view.report.sources), *view.lengths, *(one.source for one in _all(view))]
    )
    numbers = dict(zip(names, count()))
    sections = [
        ("sets", "Sets", _section("sets", "Sets", "", counts_html(view.report, names))),
        ("lengths", "Lengths", _lengths(view, names)),
        ("documents", "Documents", _documents(view, names, numbers)),
        ("packs", "Packs", _packs(view, names)),
        ("dropped", "Dropped rows", _dropped(view, names, numbers)),
    ]
    name = safe(view.recipe_name)
    return whole_page(
        HERE,
        title=f"{name}: what the model will see",
        header=f"""<a class="skip" href="#documents">Skip to the documents</a>
<header class="page"><p class="kind">llama-ft preview</p><h1>{name}</h1>
<p class="lede">{summary(view.report)}</p><dl class="settings">{_settings(view)}</dl></header>""",
        notes=faults_html(view.report),
        sections=sections,
        after='<output id="token" role="status" hidden></output>\n',
    )


def _all(view: PageView) -> Iterable[PageDocument]:
    return [*view.documents, *view.dropped, *(document for pack in view.packs for document in pack)]


def short_names(labels: Iterable[str]) -> dict[str, str]:
    """A label's last part, where no other label ends the same."""
    labels = list(dict.fromkeys(labels))
    last = [label.rsplit("/", 1)[-1] for label in labels]
    return {label: part if last.count(part) == 1 else label for label, part in zip(labels, last, strict=True)}


def _settings(view: PageView) -> str:
    pairs = [("template", safe(view.template)), ("max_length", f"{view.max_length:,}")]
    if view.end_token_id is not None:
        pairs.append(("end token", f"id {view.end_token_id:,}"))
    return "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs)


def _section(anchor: str, title: str, words: str, body: str) -> str:
    said = f'<p class="about">{words}</p>' if words else ""
    return f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{title}</h2><div>{said}{body}</div></section>\n'


def _lengths(view: PageView, names: dict[str, str]) -> str:
    beyond: dict[str, Beyond] = {}
    for one in view.report.sources:  # one file may be both trained on and evaluated on
        of_set = beyond.setdefault(one.label, Beyond())
        of_set.dropped += sum(one.dropped.get(reason, 0) for reason in TOO_LONG)
        of_set.cut += one.truncated
    body = lengths_html(view.lengths, beyond, view.max_length, names)
    words = "Kept documents by their number of tokens."
    if any(document.rejected is not None for document in view.documents):
        words = "Kept pairs by their number of tokens: of the prompt with the longer of its two answers."
    return body and _section("lengths", "Lengths", words, body)


LEGEND = (
    '<p class="legend" aria-label="Legend"><span class="tokens"><mark>carries loss</mark> <span>context</span> '
    '<mark class="end">end token</mark></span> <span>↵ newline</span> <span>→ tab</span> <span>· loose space</span> '
    "<span>‥ the rest of a character</span> "
    "<span>\\u202e a character that would not show</span></p>"
)


def _documents(view: PageView, names: dict[str, str], numbers: dict[str, int]) -> str:
    if not view.documents:
        return _section("documents", "Documents", "There is no document to show.", "")
    kept = sum(one.kept for one in view.report.sources)
    shown = len(view.documents)
    words = f"{shown:,} of {kept:,} kept documents." if shown < kept else f"All {plural(shown, 'document')}."
    words += " Point at a token, tap it, or step with the arrow keys to see its id and position."
    seen = dict.fromkeys(document.source for document in [*view.documents, *view.dropped])
    options = "".join(f'<option value="{numbers[label]}">{safe(names[label])}</option>' for label in seen)
    filters = (
        '<form class="filters" hidden><label>Set <select id="source"><option value="">all</option>'
        f'{options}</select></label><label>Text <input id="search" type="search" autocomplete="off" spellcheck="false">'
        '</label><label class="tick"><input id="truncated" type="checkbox"> only truncated</label>'
        '<output id="shown" role="status"></output></form>'
    )
    body = "".join(document_html(document, numbers[document.source], names) for document in view.documents)
    return _section("documents", "Documents", words, f"{LEGEND}{filters}{body}")


def _packs(view: PageView, names: dict[str, str]) -> str:
    if not view.packs:
        return ""
    words, body = packs_html(view.packs, names)
    return _section("packs", "Packs", words, body)


def _dropped(view: PageView, names: dict[str, str], numbers: dict[str, int]) -> str:
    groups = []
    for reason in dict.fromkeys([*reasons(view.report), *(document.dropped or "" for document in view.dropped)]):
        total = sum(one.dropped.get(reason, 0) for one in view.report.sources)
        shown = [document for document in view.dropped if (document.dropped or "") == reason]
        body = "".join(document_html(document, numbers[document.source], names) for document in shown)
        groups.append(
            f'<section class="reason"><h3>{safe(reason)} <small>{plural(total or len(shown), "row")}</small></h3>'
            f"{reason_html(view.report, reason, names)}{body}</section>"
        )
    return _section("dropped", "Dropped rows", "", "".join(groups)) if groups else ""
