"""Links in docs/ point where they say: the file is there, and the named line holds the name.

`python -m tests.test_docs` moves the line numbers after code has moved.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>[^)#\s]+)(?:#(?P<anchor>[^)]+))?\)")


def links(page: Path) -> list[re.Match[str]]:
    return [link for link in LINK.finditer(page.read_text(encoding="utf-8")) if "://" not in link["path"]]


def definitions(file: Path, name: str) -> list[int]:
    """Lines (1-based) that define `name`."""
    wanted = re.compile(rf"\s*(def|class) {re.escape(name)}\b|{re.escape(name)}\b.* = ")
    return [n for n, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1) if wanted.match(line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_hold(page):
    for link in links(page):
        file = (page.parent / link["path"]).resolve()
        assert file.exists(), f"{page.name}: {link['path']}"
        if link["anchor"] and re.fullmatch(r"L\d+", link["anchor"]):
            found = definitions(file, link["text"].strip("`"))
            assert int(link["anchor"][1:]) in found, (
                f"{page.name}: {link['text']} stands at {found}, not {link['anchor']}"
            )


def test_the_model_page_points_at_lines():
    assert sum(bool(link["anchor"]) for link in links(ROOT / "docs" / "llama.md")) >= 15


def mend(page: Path) -> None:
    """Rewrites line numbers of links whose name is defined once, or nearest to where it was."""

    def moved(link: re.Match[str]) -> str:
        if not link["anchor"] or not re.fullmatch(r"L\d+", link["anchor"]):
            return link[0]
        found = definitions((page.parent / link["path"]).resolve(), link["text"].strip("`"))
        nearest = min(found, key=lambda line: abs(line - int(link["anchor"][1:])))
        return f"[{link['text']}]({link['path']}#L{nearest})"

    page.write_text(LINK.sub(moved, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for one in PAGES:
        mend(one)
