"""The chat page in a real browser, at the width of a desk and of a phone, in light and in dark.

Skips where gradio, playwright or a Chromium is missing (tests/browser/test_preview_page.py says how to have them). With
axe-playwright-python installed, the rules of axe are checked too. Screenshots lie in the test's folder, or in the one
that `--basetemp` names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="gradio is not installed (extra web)")
pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from llama_ft.serve.web.page import Settings
from tests.browser.test_preview_page import browser  # noqa: F401  (fixture)
from tests.serve.pages import make_page, served
from tests.serve.test_chat import QUESTION, greedy_answer

SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
HOSTILE = (
    '<img src="http://evil.example/a.png" onerror="window.hacked=1"> ![x](http://evil.example/b.png) '
    "<script>window.hacked=1</script> [link](javascript:window.hacked=1)"
)
STATUS = "document.querySelector('#status').innerText"


@pytest.fixture(scope="module")
def alone(run) -> Iterator[Any]:
    page = make_page(run.path)
    with served(page) as url:
        yield page, url


@pytest.fixture(scope="module")
def pair(run) -> Iterator[str]:
    with served(make_page(run.path, compare=True)) as url:
        yield url


class Tab:
    """A tab that notes what it asks of whom, and every complaint of the browser."""

    def __init__(self, browser: Any, url: str, size: str = "desktop", scheme: str = "light"):  # noqa: F811
        width, height = SIZES[size]
        self.url = url
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.strangers: list[str] = []
        self.complaints: list[str] = []
        self.page.on("response", self._note)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_selector("#question textarea")

    def _note(self, response: Any) -> None:
        if not response.url.startswith((self.url, "data:", "blob:")):
            self.strangers.append(response.url)
        elif response.status >= 400:
            self.complaints.append(f"{response.status} {response.url}")

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def ask(self, question: str, end: str = "Done.") -> None:
        self.page.fill("#question textarea", question)
        self.page.press("#question textarea", "Enter")
        self.page.wait_for_function("document.querySelector('#question textarea').value === ''")
        self.ended(end)

    def ended(self, status: str) -> None:
        self.page.wait_for_function(f"{STATUS} === {json.dumps(status)}")

    def texts(self, side: int = 0) -> list[str]:
        return self.page.locator(".side").nth(side).locator("[data-testid=user], [data-testid=bot]").all_inner_texts()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:  # noqa: F811
    opened: list[Tab] = []

    def open_tab(*args: Any, **options: Any) -> Tab:
        opened.append(Tab(browser, *args, **options))
        return opened[-1]

    yield open_tab
    for one in opened:
        assert not one.strangers and not one.complaints
        one.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sides", [1, 2])
def test_it_lies_within_the_screen(tab, alone, pair, tmp_path, sides, size, scheme):
    one = tab(alone[1] if sides == 1 else pair, size=size, scheme=scheme)
    one.ask("Who? " + "word" * 60)
    one.ask(QUESTION)
    width, height = SIZES[size]
    page = one.page
    page.screenshot(path=tmp_path / f"{sides}-{size}-{scheme}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for part in ("#question textarea", "#send", "#stop", "#status", "#title h1"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, part
        assert box["y"] >= 0 and box["y"] + box["height"] <= height, f"{part} is not on the first screen"
    for chat in page.locator(".chat").all():
        assert chat.bounding_box()["height"] > 150
        label, log = chat.locator("label").bounding_box(), chat.locator("[role=log]").bounding_box()
        assert log["y"] >= label["y"] + label["height"] - 1, "the name lies over the words"
    if size == "desktop":
        assert page.evaluate("document.documentElement.scrollHeight") <= height
    else:
        page.locator("#settings button").last.scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / f"{sides}-{size}-{scheme}-settings.png")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(paper[:3]) > 600) == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_axe_finds_nothing_serious(tab, pair, size, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    one = tab(pair, size=size, scheme=scheme)
    found = list(axe.Axe().run(one.page).response["violations"])
    one.ask(QUESTION)
    found += axe.Axe().run(one.page).response["violations"]
    assert [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")] == []


def test_what_is_shown_is_what_was_said(tab, alone, run):
    one = tab(alone[1])
    one.ask(QUESTION)
    assert one.texts() == [QUESTION, greedy_answer(run)]
    cost = one.page.locator(".html-container .cost").inner_text()
    assert cost.startswith("48 tokens · ") and " tokens/s · first after " in cost
    one.page.get_by_role("button", name="New conversation").click()
    one.ended("New conversation.")
    assert one.texts() == []
    one.ask(QUESTION)
    assert one.texts() == [QUESTION, greedy_answer(run)]


def test_side_by_side(tab, pair, run):
    one = tab(pair)
    one.ask(QUESTION)
    assert one.texts(1) == [QUESTION, greedy_answer(run)]
    assert one.texts(0)[0] == QUESTION and one.texts(0)[1] != greedy_answer(run)
    names = one.page.locator("[role=log]").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert names[0].startswith("Conversation with base: ") and names[1].startswith("Conversation with tuned: ")


def test_by_keys_alone(tab, alone):
    one = tab(alone[1])
    keys = one.page.keyboard
    assert one.page.evaluate("document.activeElement.closest('#question') !== null"), "one can type at once"
    keys.type("One?")
    keys.press("Shift+Enter")
    keys.type("Two?")
    keys.press("Enter")
    one.ended("Done.")
    assert one.texts()[0] == "One?\nTwo?"
    reached = set()
    one.page.focus("[role=log]")
    for _ in range(40):
        keys.press("Tab")
        reached.add(
            one.page.evaluate("(e => e.id || e.closest('.block')?.innerText || e.innerText)(document.activeElement)")
        )
    reached_text = " ".join(reached)
    wanted = (
        "send",
        "System prompt",
        "Temperature",
        "Top-p",
        "Longest answer",
        "Seed",
        "Format Markdown",
        "Save as JSON",
    )
    for name in wanted:
        assert name in reached_text, name
    assert one.page.locator("#status").get_attribute("role") == "status"


def test_words_cannot_reach_out(browser, alone):  # noqa: F811
    """Neither exact nor formatted does a text run a script, or make the browser ask another host."""
    one = Tab(browser, alone[1])
    one.ask(HOSTILE)
    assert one.texts()[0] == HOSTILE
    assert not one.complaints
    one.page.click("text=Format Markdown")
    one.page.wait_for_function("document.querySelector('[data-testid=user]').innerText.includes('<script>') === false")
    time.sleep(0.5)
    assert one.page.evaluate("window.hacked") is None
    assert not one.strangers
    assert not one.page.locator("[href^='javascript']").count()
    one.page.click("text=Format Markdown")
    one.page.wait_for_function(f"document.querySelector('[data-testid=user]').innerText === {json.dumps(HOSTILE)}")
    one.context.close()


def test_saving(tab, alone, run):
    one = tab(alone[1])
    one.page.click("text=Save as JSON")
    one.ended("Nothing to save yet.")
    one.ask(QUESTION)
    with one.page.expect_download() as saved:
        one.page.click("text=Save as JSON")
    row = json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))
    said = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": greedy_answer(run)}]
    assert row == {"messages": said, "model": run.path.name}
    assert saved.value.suggested_filename.endswith(".jsonl")
    with one.page.expect_download() as saved:
        one.page.click("text=Save as Markdown")
    assert Path(saved.value.path()).read_text(encoding="utf-8").startswith(f"# {run.path.name}\n\n## User\n\n")


@pytest.fixture(scope="module")
def endless(run) -> Iterator[Any]:
    """Long answers."""
    page = make_page(run.path, settings=Settings(None, 0.0, 1.0, 450, None))
    with served(page) as url:
        yield page, url


def test_stop_and_go_on(tab, endless):
    one = tab(endless[1])
    assert one.page.locator("#stop").is_disabled()
    one.page.fill("#question textarea", QUESTION)
    one.page.press("#question textarea", "Enter")
    one.page.click("#stop:not([disabled])")
    one.ended("Stopped.")
    assert one.page.locator("#stop").is_disabled()
    assert one.page.locator(".html-container .cost").inner_text().endswith("stopped")
    one.page.fill("#question textarea", "Next?")
    one.page.press("#question textarea", "Enter")
    one.page.wait_for_function("document.querySelectorAll('[data-testid=user]').length === 2")


def test_a_closed_tab_stops_its_answer(browser, endless):  # noqa: F811
    page, url = endless
    one = Tab(browser, url)
    one.page.fill("#question textarea", QUESTION)
    one.page.press("#question textarea", "Enter")
    one.page.wait_for_selector("#stop:not([disabled])")
    one.page.wait_for_selector("[data-testid=bot]")
    assert page._answering
    one.context.close()
    end = time.monotonic() + 60
    while page._answering and time.monotonic() < end:
        time.sleep(0.01)
    assert not page._answering
    assert len(page.speakers[0]._generator.seen) < 440


def test_two_tabs_wait_for_one_another(tab, alone, run):
    tabs = [tab(alone[1]), tab(alone[1])]
    for one in tabs:
        one.page.fill("#question textarea", QUESTION)
    for one in tabs:
        one.page.press("#question textarea", "Enter")
    for one in tabs:
        one.ended("Done.")
        assert one.texts() == [QUESTION, greedy_answer(run)]


def test_a_refused_question_comes_back(tab, alone):
    one = tab(alone[1])
    question = ("word " * 600).strip()
    one.page.fill("#question textarea", question)
    one.page.press("#question textarea", "Enter")
    one.ended("The question has no answer.")
    assert one.page.input_value("#question textarea") == question
    assert one.page.locator(".html-container .cost").inner_text().endswith("the model holds 512")
