"""The page of `llama-ft preview --html`: what it says is what the view holds, and no row can add anything to it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from llama_ft.data.documents import OVERLONG
from llama_ft.data.page.lengths import Beyond, lengths_html
from llama_ft.data.page.tokens import visible
from llama_ft.data.page.write import PageDocument, PageView, page_document, write_page
from llama_ft.data.render import MASKED, Renderer
from llama_ft.data.report import Fault, Report, SourceReport
from llama_ft.data.template import Template
from llama_ft.errors import UserError

SET = "data/rows.jsonl"
HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</style></script><img src=x onerror='window.hacked = 1'>",
    '" onmouseover="window.hacked = 1" x=\'',
    "&lt;b&gt; &amp; <!-- ]]> {{ x }} ${y} $name",
    "\u2028\u2029\u202eright to left\u2066 \x00\x07\x1b[2J \ufeff\u200b\U000e0041",
    "lone \ud800 surrogate",
    "W" * 5000,
]


@dataclass
class Row:
    """The fields of a document that a page reads."""

    text: str
    ids: np.ndarray
    labels: np.ndarray
    offsets: list[tuple[int, int]]
    row: int = 0
    dropped: str | None = None
    truncated: bool = False
    rejected: Any = None


def words(text: str, *, loss: int, row: int = 0, **changes: Any) -> PageDocument:
    """A document with a token per word, the last `loss` of which carry loss, the last of them the end token."""
    pieces = re.findall(r"\s*\S+|\s+$", text)
    last = len(pieces) - 1
    tokens = [(piece, i > last - loss, loss > 0 and i == last) for i, piece in enumerate(pieces)]
    return replace(PageDocument(SET, row, tokens, None, False, None, list(range(100, 101 + last))), **changes)


def view(documents: list[PageDocument], **changes: Any) -> PageView:
    counts = SourceReport(SET, "train", rows=12, kept=8, held_out=1, tokens=1200, labelled=300, longest=200)
    counts.dropped = {"empty answer": 2, OVERLONG: 1}
    counts.examples = {"empty answer": [3, 7], OVERLONG: [9]}
    lengths = {SET: [10, 20, 200]}
    return replace(PageView("test", "chatml", 256, Report([counts]), documents, [], [], lengths, 2), **changes)


def hostile_view() -> PageView:
    """Every place of a page that takes words from outside, filled with the worst."""
    label = "dir/<script>window.hacked = 1</script>\u202e.jsonl"
    documents = [
        words(f"{text} end", loss=1, row=i, source=label, truncated=i == 1, refusal=text)
        for i, text in enumerate(HOSTILE)
    ]
    counts = SourceReport(label, "train", rows=9, kept=8, tokens=10, labelled=5)
    counts.dropped = dict.fromkeys(HOSTILE, 1)
    counts.examples = {text: [0] for text in HOSTILE}
    report = Report([counts], [Fault(text, text, text, text) for text in HOSTILE])
    dropped = [replace(documents[0], dropped=text, ids=[]) for text in HOSTILE]
    pair = words("a b c", loss=1, row=99, source=label, rejected=[(HOSTILE[0], True, False)])
    documents.append(pair)
    return PageView(HOSTILE[0], HOSTILE[1], 64, report, documents, dropped, [documents[:3]], {label: [5, 7]}, 2)


class Seen(HTMLParser):
    """Elements of a page with their attributes, and the text of those asked for."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[int, str]] = []
        self.texts: dict[int, str] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "input", "br", "rect", "path"}:
            self.open.append((len(self.elements) - 1, tag))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for number, _ in self.open:
            self.texts[number] = self.texts.get(number, "") + data

    def all(self, tag: str, css: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, self.texts.get(i, ""))
            for i, (name, attributes) in enumerate(self.elements)
            if name == tag and (css is None or css in (attributes.get("class") or "").split())
        ]


@dataclass
class Page:
    html: str
    seen: Seen = field(init=False)

    def __post_init__(self) -> None:
        self.seen = Seen(self.html)


def written(tmp_path: Path, what: PageView) -> Page:
    write_page(tmp_path / "page.html", what)
    return Page((tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("train_on", ["responses", "all"])
def test_pieces_are_the_text_and_loss_is_the_labels(mini_tokenizer: PreTrainedTokenizerFast, train_on: Any) -> None:
    renderer = Renderer(Template.load("chatml"), mini_tokenizer)
    said = "Grass 🦙 日本.\n\n\tAnd  hay. "
    rendered = renderer.render([{"role": "user", "content": "What?"}, {"role": "assistant", "content": said}])
    encoded = renderer.encode([rendered], train_on)[0]
    page = page_document(Row(encoded.text, encoded.ids, encoded.labels, encoded.offsets, 7), SET, renderer.end_token_id)  # type: ignore[arg-type]
    assert "".join(piece for piece, _, _ in page.tokens) == encoded.text
    assert page.ids == encoded.ids.tolist() and len(page.tokens) == len(page.ids)
    loss = encoded.labels != MASKED
    loss[0] = False
    assert [token[1] for token in page.tokens] == loss.tolist()
    ends = [i for i, token in enumerate(page.tokens) if token[2]]
    assert ends and all(page.ids[i] == renderer.end_token_id and loss[i] for i in ends)


def test_a_row_without_tokens_shows_its_text() -> None:
    empty = np.empty(0, dtype=np.int32)
    page = page_document(Row("a  b\n", empty, empty, [], dropped="empty answer"), SET, 2)  # type: ignore[arg-type]
    assert page.tokens == [("a  b\n", False, False)] and page.ids == []


def test_tokens_without_a_place_in_the_text_are_decoded() -> None:
    """Infilling puts a text into another order, so that its tokens have no offsets."""
    ids = np.array([5, 6, 7], dtype=np.int32)
    page = page_document(Row("x y", ids, ids, [(0, 0)] * 3), SET, 7, decode=lambda token: f"<{token}>")  # type: ignore[arg-type]
    assert page.tokens == [("<5>", False, False), ("<6>", True, False), ("<7>", True, True)]


def test_signs_stand_for_what_would_not_show() -> None:
    assert visible("a b, ü 日本 👩‍👩‍👧") == "a b, ü 日本 👩‍👩‍👧"
    assert visible("a\n\tb  c ") == "a↵\n→\tb· c·"
    assert visible("\r\x00\x1b\x85\xa0") == r"\u000d\u0000\u001b\u0085\u00a0"
    assert visible("\u202e\u2066\u200b\ufeff\u2028\ud800\U000e0041") == (
        r"\u202e\u2066\u200b\ufeff\u2028\ud800\U000e0041"
    )


def test_no_row_can_add_an_element_or_an_attribute(tmp_path: Path) -> None:
    page = written(tmp_path, hostile_view())
    tags = [tag for tag, _ in page.seen.elements]
    assert tags.count("script") == tags.count("style") == 1 and "img" not in tags
    for tag, attributes in page.seen.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#") and "src" not in attributes
    assert HOSTILE[0] in page.seen.all("h1")[0][1]
    assert not re.search("[\u2028\u2029\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f]", page.html)


def test_the_page_allows_its_own_style_and_script_alone(tmp_path: Path) -> None:
    page = written(tmp_path, view([words("a b", loss=1)]))
    policy = next(a["content"] for t, a in page.seen.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        (_, text), digest = page.seen.all(tag)[0], hashlib.sha256()
        digest.update(text.encode())
        assert f"{tag}-src 'sha256-{base64.b64encode(digest.digest()).decode()}'" in policy
    assert not re.search(r"(https?:)?//\w", re.sub(r"<style>.*</style>|<script>.*</script>", "", page.html, flags=re.S))


def test_runs_hold_every_token_with_its_length_and_id(tmp_path: Path) -> None:
    document = words("user 🦙🦙 says <b> & assistant yes indeed.", loss=2)
    page = written(tmp_path, view([document]))
    runs = [(a, t) for tag in ("span", "mark") for a, t in page.seen.all(tag) if "data-t" in a]
    entries = []
    for attributes, text in runs:
        pairs = [entry.split(":") for entry in (attributes["data-t"] or "").split(" ")]
        assert sum(int(length) for length, _ in pairs) == len(text.encode("utf-16-le")) // 2
        entries += [int(number) for _, number in pairs]
    assert entries == document.ids
    assert [text for _, text in page.seen.all("mark") if text in {" yes", " indeed."}] == [" yes", " indeed."]


def test_counts_faults_and_later_columns(tmp_path: Path) -> None:
    one = view([])
    counts: Any = one.report.sources[0]
    page = written(tmp_path, one)
    cells = {a["data-name"]: text for a, text in page.seen.all("td")}
    assert cells == {
        "for": "train", "rows": "12", "kept": "8", "held out": "1", "dropped": "3", "truncated": "0",
        "tokens": "1,200", "with loss": "25%", "longest": "200",
    }  # fmt: skip
    assert "12 rows became 8 documents" in page.html and not page.seen.all("section", "faults")

    counts.duplicates, counts.parts, counts.drawn, counts.share, counts.repeats = 4, 2, 2000, 0.25, 1.5
    counts.notes, counts.guessed = {"HTML taken out": 6}, "layout: alpaca, guessed"
    one.report.faults = [Fault("two-bos", "two in a row", "rows.jsonl, row 3", "look"), Fault("no-documents", "none")]
    page = written(tmp_path, one)
    cells = {a["data-name"]: text for a, text in page.seen.all("td")}
    assert (cells["copies"], cells["later parts"]) == ("4", "2")
    assert (cells["documents"], cells["share"], cells["each is seen"]) == ("2,000", "25.0%", "1.50×")
    notes = page.seen.all("ul", "notes")[0][1]
    assert "HTML taken out 6" in notes and "guessed" in notes
    faults = page.seen.all("section", "faults")[0][1]
    assert "Training will not start" in faults and "rows.jsonl, row 3" in faults
    assert "--allow two-bos" in faults and "--allow no-documents" not in faults
    one.report.allowed, one.report.faults = ["two-bos"], one.report.faults[:1]
    faults = written(tmp_path, one).seen.all("section", "faults")[0][1]
    assert "will not start" not in faults and "accepted by name" in faults


def test_dropped_rows_stand_under_their_reason_and_none_is_left_out(tmp_path: Path) -> None:
    shown = words("a b", loss=0, row=3, dropped="empty answer", ids=[])
    page = written(tmp_path, view([], dropped=[shown]))
    first, second = (text for _, text in page.seen.all("section", "reason"))
    assert first.startswith("empty answer 2 rows") and "rows.jsonl: 3, 7" in first and "not tokenised" in first
    assert second.startswith(f"{OVERLONG} 1 row") and "9" in second


def test_positions_begin_again_with_each_document_of_a_pack(tmp_path: Path) -> None:
    pack = [words("a b c", loss=1, row=4), words("d e", loss=1, row=9)]
    page = written(tmp_path, view([], packs=[pack]))
    flow = [(a["data-from"], a["data-place"]) for a, _ in page.seen.all("span", "tokens") if "data-from" in a]
    assert flow == [("0", "0"), ("0", "3")]
    assert page.seen.all("p", "starts")[0][1] == "cu_seqlens 0, 3, 5"
    assert [text for _, text in page.seen.all("span", "edge")] == [
        "1 row 4 of rows.jsonl, positions 0–2",
        "2 row 9 of rows.jsonl, positions 0–1",
    ]


@pytest.mark.parametrize(("limit", "cut"), [(512, 0), (512, 30), (4096, 0)])
def test_histograms_count_every_document(limit: int, cut: int) -> None:
    numbers = np.random.default_rng(3).integers(1, 513, 50_000).tolist() + [512] * cut
    html = lengths_html({"a": numbers, "b": [1]}, {"a": Beyond(dropped=17, cut=cut)}, limit, {"a": "<a>", "b": "b"})
    figure = Seen(html.split("</figure>")[0])
    titles = [text for _, text in figure.all("title")]
    bars = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in titles if "tokens: " in text]
    assert sum(bars) == len(numbers) + 17
    assert f"longer than {limit:,} tokens: 17 dropped" in titles
    assert (f"{cut:,} cut to {limit:,}" in titles) == bool(cut)
    assert len(html) < 30_000 and "<a>" not in html
    for attributes, _ in figure.all("rect"):
        x, width = float(attributes["x"] or 0), float(attributes["width"] or 0)
        assert x >= 0 and x + width <= 340


def test_a_bar_ends_with_the_length_that_it_names() -> None:
    html = lengths_html({"a": [20, 21, 40, 800]}, {}, 1024, {"a": "a"})
    titles = [text for _, text in Seen(html).all("title")]
    assert titles == ["1–20 tokens: 1 document", "21–40 tokens: 2 documents", "781–800 tokens: 1 document"]


def test_two_hundred_long_documents_stay_below_ten_megabytes(tmp_path: Path) -> None:
    document = words("".join(f" word{i % 997}" for i in range(2000)), loss=900)
    documents = [replace(document, row=i, ids=list(range(30_000, 32_000))) for i in range(200)]
    write_page(tmp_path / "page.html", view(documents, packs=[documents[:8]]))
    assert (tmp_path / "page.html").stat().st_size < 10e6


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.*the page cannot be written"):
        write_page(tmp_path / "missing" / "page.html", view([]))


def test_nothing_to_show_is_a_page_too(tmp_path: Path) -> None:
    page = written(tmp_path, PageView("empty", "chatml", 8, Report(), [], [], [], {}, None))
    assert "There is no document to show" in page.html and not page.seen.all("figure")


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_by_a_contrast_of_four_and_a_half(theme: str, tmp_path: Path) -> None:
    style = written(tmp_path, view([])).seen.all("style")[0][1]
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.S)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", light if theme == "light" else light + dark))
    assert len(colours) >= 12
    pairs = [(ink, paper) for ink in ("ink", "soft") for paper in ("paper", "shade", "fault-paper")]
    pairs += [("loss", "loss-a"), ("loss", "loss-b"), ("on-loss", "loss"), ("over", "paper"), ("fault", "fault-paper")]
    pairs += [("paper", "ink")]
    for ink, paper in pairs:
        low, high = sorted((luminance(colours[ink]), luminance(colours[paper])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (theme, ink, paper)
