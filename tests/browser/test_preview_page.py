"""The preview page in a real browser: it lies within the screen, its filters and keys work, and rows stay text.

Skips where playwright or a Chromium is missing (`pip install playwright`, then `playwright install chromium`, or any
`chromium` or `google-chrome` on PATH).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama_ft.data.page.write import PageDocument, PageView, write_page
from llama_ft.data.report import Fault, Report, SourceReport
from tests.data.test_page import HOSTILE, hostile_view, words

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

WORDS = "A llama eats grass, hay and now and then a carrot. " * 80


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no chromium or google-chrome on PATH, and playwright has none of its own")
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses to run as root
        try:
            browser = playwright.chromium.launch(executable_path=found, args=root)
        except api.Error as error:
            pytest.skip(f"the browser does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails the test if the browser complains about anything, or asks anybody for anything."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda asked: None if asked.url.startswith("file:") else complaints.append(asked.url))
    page.set_default_timeout(10_000)
    yield page
    assert not complaints
    page.close()


def a_view() -> PageView:
    """Two sets, a pair, a pack, a dropped row and a fault; row 3 is truncated, row 4 long."""
    documents = [words(f"question {i} answered {i} thus.", loss=2, row=i, source="a.jsonl") for i in range(5)]
    documents[3] = replace(documents[3], truncated=True)
    documents[4] = words(WORDS, loss=300, row=4, source="a.jsonl")
    documents += [words(f"other 🦙 {i} yes.", loss=1, row=i, source="dir/b.jsonl") for i in range(3)]
    pair = words("which is better? This one.", loss=2, row=0, source="dir/b.jsonl")
    worse = words("which is better? No.", loss=1)
    documents.append(replace(pair, rejected=worse.tokens, rejected_ids=worse.ids, shared=3))
    counts = [SourceReport(label, "train", 6, 5, tokens=900, labelled=400) for label in ("a.jsonl", "dir/b.jsonl")]
    counts[0].dropped, counts[0].examples = {"empty answer": 1}, {"empty answer": [5]}
    dropped = [PageDocument("a.jsonl", 5, [("no answer", False, False)], "empty answer", False, None, [])]
    report = Report(counts, [Fault("two-bos", "two in a row", "a.jsonl, row 2", "look")])
    lengths = {"a.jsonl": list(range(1, 200)), "dir/b.jsonl": [5, 6, 300]}
    return PageView("test", "chatml", 300, report, documents, dropped, [documents[:3]], lengths, 2)


@pytest.fixture
def opened(page: Any, tmp_path: Path) -> Any:
    write_page(tmp_path / "page.html", a_view())
    page.goto((tmp_path / "page.html").as_uri())
    return page


def wide(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
def test_nothing_is_wider_than_the_screen(page: Any, tmp_path: Path, width: int, scheme: str, hostile: bool) -> None:
    write_page(tmp_path / "page.html", hostile_view() if hostile else a_view())
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    page.goto((tmp_path / "page.html").as_uri())
    assert not wide(page)
    for button in page.locator("button.more").all():
        button.click()
    for article in page.locator("article").all():
        article.scroll_into_view_if_needed()
    page.locator(".pack .t").first.wait_for()
    assert not wide(page)
    cut_off = "boxes => boxes.filter((box) => box.scrollWidth > box.clientWidth).length"
    assert page.locator("div.tokens, .flow").evaluate_all(cut_off) == 0
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(paper) > 600) == (scheme == "light")


def test_rows_stay_text(page: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", hostile_view())
    page.goto((tmp_path / "page.html").as_uri())
    page.locator("article").first.scroll_into_view_if_needed()
    page.locator(".t").first.hover()
    page.fill("#search", "<script>window")
    api.expect(page.locator("#shown")).to_contain_text("of")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, script").count() == 1  # the page's own script
    assert HOSTILE[0] in page.locator("article.document .tokens:visible").first.inner_text()


def test_filters_by_set_truncation_and_text(opened: Any) -> None:
    shown = opened.locator("article.document:visible h4")
    assert shown.count() == 10
    opened.select_option("#source", label="b.jsonl")
    api.expect(opened.locator("#shown")).to_have_text("4 of 10 shown")
    assert all("b.jsonl" in text for text in shown.all_inner_texts())
    assert not opened.locator(".reason").first.is_visible()
    opened.select_option("#source", "")
    opened.check("#truncated")
    api.expect(opened.locator("#shown")).to_have_text("1 of 10 shown")
    assert shown.all_inner_texts() == ["row 3 of a.jsonl"]
    opened.uncheck("#truncated")
    opened.fill("#search", "QUESTION 2  answered")
    api.expect(shown).to_have_text(["row 2 of a.jsonl"])
    opened.fill("#search", "")
    api.expect(opened.locator("#shown")).to_have_text("")
    assert shown.count() == 10


def test_a_token_tells_its_id_and_position(opened: Any) -> None:
    said = opened.locator("#token")
    opened.locator("article.document").nth(1).scroll_into_view_if_needed()
    tokens = opened.locator("article.document").nth(1).locator(".t")
    tokens.nth(3).hover()
    assert said.inner_text() == "id 103 · position 3 · carries loss"
    assert [text.strip() for text in tokens.all_inner_texts()] == ["question", "1", "answered", "1", "thus."]
    tokens.nth(4).hover()
    assert said.inner_text() == "id 104 · position 4 · end token, carries loss"
    opened.locator("h1").hover()
    assert not said.is_visible()
    opened.locator(".pack").scroll_into_view_if_needed()
    opened.locator(".pack .tokens").nth(1).locator(".t").first.hover()
    assert said.inner_text() == "id 100 · position 0 · place 5 in the pack · context, no loss"
    inside = said.bounding_box()
    assert inside["x"] >= 0 and inside["x"] + inside["width"] <= 1280


def test_keys_step_through_tokens_and_open_what_is_folded(opened: Any) -> None:
    long = opened.locator("article.document").nth(4)
    box = long.locator(".tokens")
    folded = box.bounding_box()["height"]
    box.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        opened.keyboard.press(key)
    assert opened.locator("#token").inner_text().startswith("id 100 · position 0 ·")
    opened.keyboard.press("End")
    assert "end token" in opened.locator("#token").inner_text()
    assert box.bounding_box()["height"] > folded and long.locator("button").count() == 0
    opened.keyboard.press("Escape")
    assert not opened.locator("#token").is_visible()


def test_chosen_lies_beside_rejected_and_below_it_on_a_phone(opened: Any) -> None:
    def places() -> Any:  # in one look: bringing an article into view may move the page
        opened.locator(".pair").scroll_into_view_if_needed()
        return opened.locator(".pair section").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect().toJSON())"
        )

    left, right = places()
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    sides = opened.locator(".pair .tokens")
    sides.nth(1).locator(".t").first.hover()
    assert opened.locator("#token").inner_text() == "id 103 · position 3 · end token, carries loss"
    opened.set_viewport_size({"width": 390, "height": 844})
    above, below = places()
    assert above["x"] == below["x"] and above["y"] + above["height"] <= below["y"]


def test_loss_is_told_without_colour(opened: Any) -> None:
    style = "element => { const s = getComputedStyle(element); return [s.borderBottomStyle, s.borderBottomWidth]; }"
    assert opened.locator("article.document mark").first.evaluate(style) == ["solid", "1px"]
    assert opened.locator("article.document [data-t]").first.evaluate(style)[0] == "none"


def test_the_page_reads_without_its_script(browser: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", a_view())
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert "question 1 answered 1 thus." in page.locator("article.document").nth(1).text_content()
    assert not page.locator(".filters").is_visible()
    assert page.locator("article.document").nth(4).text_content().count("carrot") == 80
    context.close()
