"""The page of `llama-ft compare` in a real browser. Skips where playwright or a Chromium is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama_ft.evaluate.compare_page import write_page
from tests.browser.test_preview_page import api, browser, page, wide  # noqa: F401  (fixtures)
from tests.evaluate.test_compare import changed_run, opened, scored
from tests.train.report_runs import HOSTILE, LONG, RTL


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(page: Any, tmp_path: Path, width: int) -> None:  # noqa: F811
    """It lies within the screen, its curves answer the pointer, and what it quotes stays text."""
    said = HOSTILE + RTL + LONG
    runs = [changed_run(tmp_path / name, f"adapter.r={r}", less=r / 100, said=said) for name, r in (("a", 8), ("b", 4))]
    for run in runs:
        scored(run, [1.0, 0.0, 1.0, 1.0])
    page.set_viewport_size({"width": width, "height": 844})
    page.goto(write_page(opened(*runs), tmp_path / "page.html").as_uri())
    assert not wide(page)
    assert page.evaluate("window.hacked") is None
    plot, spoken = page.locator("figure.curve .plot").first, page.locator("figure.curve .said").first
    box = plot.bounding_box()
    plot.hover(position={"x": box["width"] * 8 / 24 + 1, "y": 30})
    assert spoken.inner_text() == f"step 8: A {4.1 - 8 / 24 - 0.08:.3f} nats · B {4.1 - 8 / 24 - 0.04:.3f} nats"
    strokes = page.locator("figure.curve .plot path[stroke]").evaluate_all(
        "all => all.map(one => getComputedStyle(one).stroke)"
    )
    assert len(set(strokes)) == 2 and "none" not in strokes
