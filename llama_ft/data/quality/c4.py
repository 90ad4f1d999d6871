"""C4's heuristics for web pages in English (Raffel et al., arXiv 1910.10683, section 2.2).

Numbers and lists are the paper's; where it is silent, its published code speaks (TensorFlow Datasets,
`text/c4_utils.py`): the ellipsis that ends no sentence, the longest word. Not here: the list of bad words, which drops
whole subjects with them, the test of language, which is a step of its own, and the copies of three sentences, for
which `near-duplicates` stands.
"""

from __future__ import annotations

import re

from llama_ft.data.quality.verdict import Verdict

FEWEST_WORDS = 5
"""Words of a line."""
FEWEST_SENTENCES = 3
"""Sentences of a page, in the lines that are left."""
LONGEST_WORD = 1000
"""Characters; a line with a longer word goes (the code's)."""
ENDS = (".", "!", "?", '"', "”")
"""What a line of prose ends with: the paper's period, exclamation mark, question mark, end quotation mark."""
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
"""A line that holds one of these goes."""
_CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_GAP = re.compile(r"\n{3,}")
_SENTENCE = re.compile(r"[.!?]+[\"”')\]]*(?=\s|$)")


def c4(text: str) -> Verdict:
    """A page without the lines that are no sentences; dropped where hardly any is left, or it is code or a dummy.

    A page that stays and lost nothing but white space around its lines is returned as it was.
    """
    lower = text.lower()
    if "lorem ipsum" in lower:
        return Verdict(text, "holds “lorem ipsum”")
    if "{" in text or "}" in text:
        return Verdict(text, "holds a curly bracket")
    kept: list[str] = []
    removed: dict[str, None] = {}
    for line in text.splitlines():
        clean = _CITATIONS.sub("", line).strip()
        rule = _removed(clean) if line.strip() else None
        if rule is None:
            kept.append(clean)
            if clean != line.strip():
                removed["citation marks"] = None
        else:
            removed[rule] = None
    sentences = sum(max(1, len(_SENTENCE.findall(line))) for line in kept if line)
    if sentences < FEWEST_SENTENCES:
        return Verdict(text, f"fewer than {FEWEST_SENTENCES} sentences in whole lines")
    if not removed:
        return Verdict(text)
    return Verdict(_GAP.sub("\n\n", "\n".join(kept)).strip(), changed=tuple(removed))


def _removed(line: str) -> str | None:
    """Why a line goes, in the code's order; None for one that stays."""
    words = line.split()
    if any(len(word) > LONGEST_WORD for word in words):
        return f"lines with a word of more than {LONGEST_WORD:,} characters"
    if not line.endswith(ENDS) or line.endswith("..."):
        return "lines without an end mark"
    if len(words) < FEWEST_WORDS:
        return f"lines of fewer than {FEWEST_WORDS} words"
    lower = line.lower()
    if "javascript" in lower:
        return "lines about JavaScript"
    if any(policy in lower for policy in POLICIES):
        return "lines about cookies and terms"
    return None
