"""Rules for files of code, in place of the rules for prose.

LLaMA filtered GitHub "based on the line length or proportion of alphanumeric characters" and gives no numbers (arXiv
2302.13971, section 2.1). The lengths are Codex's (arXiv 2107.03374, section 3.1), which speaks of a "small percentage"
of alphanumeric characters; the 25 % are those of CodeParrot's script (transformers, research_projects/codeparrot).
"""

from __future__ import annotations

from llama_ft.data.quality.verdict import Verdict

LONGEST_LINE = 1000
"""Characters of a line, at the most: Codex."""
MEAN_LINE = 100
"""Characters of a line on average, at the most: Codex."""
ALPHANUMERIC = 0.25
"""Share of letters and digits among a file's characters, white space counted, at the least."""


def code(text: str) -> Verdict:
    """Drops what is minified, generated or data."""
    lengths = [len(line) for line in text.splitlines()] or [0]
    if max(lengths) > LONGEST_LINE:
        return Verdict(text, f"a line of more than {LONGEST_LINE:,} characters")
    if sum(lengths) / len(lengths) > MEAN_LINE:
        return Verdict(text, f"lines of more than {MEAN_LINE} characters on average")
    if sum(map(str.isalnum, text)) < ALPHANUMERIC * len(text):
        return Verdict(text, f"fewer than {ALPHANUMERIC:.0%} of characters are letters and digits")
    return Verdict(text)
