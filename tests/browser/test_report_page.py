"""The report of a run in a real browser: it lies within the screen, its curves answer, and what it quotes stays text.

Skips where playwright or a Chromium is missing (see test_preview_page.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from llama_ft.train.page.write import write_page
from tests.browser.test_preview_page import api, browser, page, wide  # noqa: F401  (fixtures)
from tests.train.report_runs import HOSTILE, LONG, RTL, make_run, metrics

SHARE = "element => { const r = element.getBoundingClientRect(); return [r.left, r.right, r.top, r.bottom]; }"


@pytest.fixture
def opened(page: Any, tmp_path: Path) -> Any:  # noqa: F811
    page.goto(write_page(make_run(tmp_path / "run")).as_uri())
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
def test_nothing_is_wider_than_the_screen(page: Any, tmp_path: Path, width: int, scheme: str, hostile: bool) -> None:  # noqa: F811
    said = HOSTILE + RTL + LONG if hostile else "an answer"
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(write_page(make_run(tmp_path / "run", said=said, state="failed", message=said)).as_uri())
    assert not wide(page)
    page.locator("summary").evaluate_all("all => all.forEach(one => { one.parentElement.open = true; })")
    assert not wide(page)
    for chart in page.locator(".plot").all():
        left, right, top, bottom = chart.evaluate(SHARE)
        assert left >= 0 and right <= width and bottom - top > 100 and right - left > width / 4
    assert page.locator(".sample dd").evaluate_all("all => all.every(one => one.scrollWidth <= one.clientWidth)")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(paper) > 600) == (scheme == "light")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, script").count() == 1  # the page's own script


def test_a_curve_says_its_values_under_the_pointer(opened: Any) -> None:
    figure = opened.locator("figure.curve").first
    plot, said = figure.locator(".plot"), figure.locator(".said")
    assert not said.is_visible()
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] * 8 / 24 + 2, "y": 40})
    loss = next(line["loss"] for line in metrics() if line["step"] == 8 and "loss" in line)
    assert said.inner_text().startswith(f"step 8: {loss:.3f} nats · smoothed ")
    assert said.inner_text().endswith(f" · held-out {4.1 - 8 / 24:.3f} nats")
    cursor = figure.locator(".cursor").bounding_box()
    assert cursor["x"] == pytest.approx(box["x"] + box["width"] * 8 / 24, abs=1)
    for share in (0.0, 1.0):
        plot.hover(position={"x": share * (box["width"] - 1), "y": 40})
        inside = said.bounding_box()
        assert inside["x"] >= box["x"] - 1 and inside["x"] + inside["width"] <= box["x"] + box["width"] + 1
    opened.locator("h1").hover()
    assert not said.is_visible()


def test_keys_step_along_a_curve(opened: Any) -> None:
    figure = opened.locator("figure.curve").nth(1)
    figure.locator(".plot").focus()
    said = figure.locator(".said")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"):
        opened.keyboard.press(key)
        seen.append(said.inner_text().split(":")[0])
    assert seen == ["step 1", "step 2", "step 1", "step 24", "step 24", "step 1"]
    opened.keyboard.press("Escape")
    assert not said.is_visible()


def test_lines_lie_where_their_values_are(opened: Any) -> None:
    """The highest held-out loss, 4.1 of an axis to 4.5, stands at its height and at the left edge."""
    figure = opened.locator("figure.curve").first
    ticks = [float(text) for text in figure.locator(".scale span").all_inner_texts()]
    low, high = ticks[-1], ticks[0]
    point = "path => { const p = path.getPointAtLength(0); return [p.x, p.y]; }"
    start = figure.locator(".plot path.held").first.evaluate(point)
    assert start[0] == 0 and start[1] == pytest.approx(400 * (1 - (4.1 - low) / (high - low)), abs=0.1)
    plot = figure.locator(".plot").bounding_box()
    rules = figure.locator("path.rule").evaluate_all(f"all => all.map({SHARE})")
    places = figure.locator(".scale span").evaluate_all(f"all => all.map({SHARE})")
    assert len(rules) == len(ticks)
    for (_, _, top, _), (_, _, a, b) in zip(rules, places, strict=True):
        assert top == pytest.approx((a + b) / 2, abs=1.5), "a label stands beside its line"
    assert rules[-1][2] == pytest.approx(plot["y"] + plot["height"], abs=1.5)


def test_text_is_readable_in_both_schemes(opened: Any) -> None:
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for the lines of a graph (1.4.3, 1.4.11)."""
    colours = """() => { const s = getComputedStyle(document.documentElement);
        return Object.fromEntries(['paper','ink','soft','deep','tint','line','raw','held','wrong','wrong-paper']
            .map(name => [name, s.getPropertyValue('--' + name).trim()])); }"""
    for scheme in ("light", "dark"):
        opened.emulate_media(color_scheme=scheme)
        found = opened.evaluate(colours)
        pairs = [("ink", "paper", 4.5), ("soft", "paper", 4.5), ("held", "paper", 4.5), ("ink", "tint", 4.5)]
        pairs += [
            ("deep", "tint", 4.5),
            ("deep", "paper", 4.5),
            ("wrong", "wrong-paper", 4.5),
            ("ink", "wrong-paper", 4.5),
        ]
        pairs += [("line", "paper", 3), ("raw", "paper", 3)]
        for front, back, least in pairs:
            assert contrast(found[front], found[back]) >= least, (scheme, front, back)


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_the_page_reads_without_its_script_and_prints(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    lines = metrics(steps=200, every=20)
    lines[5]["loss"] = math.nan
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()  # noqa: F811
    page.goto(write_page(make_run(tmp_path / "run", lines=lines)).as_uri())
    assert page.locator(".plot path.line").first.is_visible()
    page.locator("figure.curve summary").first.click()
    assert "held-out" in page.locator("figure.curve details").first.inner_text()
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("h1").is_visible() and not page.locator("nav").is_visible()
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF") and len(pdf) > 20_000
    context.close()
