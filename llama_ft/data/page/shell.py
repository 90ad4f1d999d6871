"""The frame of every page of ours: one file that opens from anywhere and fetches nothing.

Style and script stand inside, and the page's own policy allows these two alone, by their hashes, so that a row of data
cannot bring in anything that runs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

FRAME = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">
<title>$title</title>
<style>$style</style></head>
<body>$header
<main id="content">$notes<nav aria-label="Sections"><ul>$links</ul></nav>
$sections</main>
$after<script>$script</script></body></html>
"""
)


def whole_page(
    folder: Path, *, title: str, header: str, notes: str, sections: Sequence[tuple[str, str, str]], after: str = ""
) -> str:
    """The page's text. `title`, `header` (the link that skips it included), `notes` and `after` are HTML.

    folder: where its page.css and page.js lie. sections: (anchor, title, HTML) each; an empty one gets no link.
    """
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return FRAME.substitute(
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{_pinned(style)}'; script-src '{_pinned(script)}'",
        title=title,
        style=style,
        header=header,
        notes=notes,
        links="".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name, html in sections if html),
        sections="".join(html for _, _, html in sections),
        after=after,
        script=script,
    )


def _pinned(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
