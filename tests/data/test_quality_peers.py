"""Our quality rules beside datatrove's on the same real texts. By hand, where an environment has datatrove and spaCy:

python -m venv DIR && DIR/bin/pip install datatrove==0.10.1 spacy==3.8.18 regex tokenizers
LLAMA_FT_DATATROVE=DIR/bin/python pytest -m peers tests/data/test_quality_peers.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llama_ft.data.quality.c4 import c4
from llama_ft.data.quality.gopher import gopher_quality
from llama_ft.data.quality.repetition import gopher_repetition
from tests.data.test_quality import texts

pytestmark = pytest.mark.peers
OTHERS = """
import json, sys
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter

filters = {
    "repetition": GopherRepetitionFilter(),
    "quality": GopherQualityFilter(),
    "letters-aside": GopherQualityFilter(max_non_alpha_words_ratio=None),
    "c4": C4QualityFilter(min_num_sentences=3, min_words_per_line=5),
}
rows = []
for text in json.load(sys.stdin):
    document = Document(text=text, id="0")
    rows.append({name: one.filter(document) is True for name, one in filters.items()})
json.dump(rows, sys.stdout)
"""


def verdicts(rows: list[str]) -> list[dict[str, Any]]:
    """Which texts datatrove keeps, by filter."""
    python = os.environ.get("LLAMA_FT_DATATROVE")
    if python is None:
        pytest.skip("LLAMA_FT_DATATROVE names no Python with datatrove")
    done = subprocess.run([python, "-c", OTHERS], input=json.dumps(rows), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_verdicts_agree_where_words_do(real_data: Path) -> None:
    """Least agreements as measured; what differs is what counts as a word, a line and a repeat (docs/quality.md)."""
    pages = texts(real_data / "text", "c4_demo.jsonl")
    others = verdicts(pages)
    judges = {"repetition": gopher_repetition, "quality": gopher_quality, "letters-aside": gopher_quality, "c4": c4}
    same = {
        name: sum((judge(page).rule is None) == other[name] for page, other in zip(pages, others, strict=True))
        for name, judge in judges.items()
    }
    assert same["repetition"] >= 290 and same["c4"] >= 299 and same["letters-aside"] >= 295
    assert same["quality"] < 280  # datatrove counts punctuation marks as words without a letter


def test_papers_and_articles(real_data: Path) -> None:
    papers = texts(real_data / "text", "arxiv.jsonl")
    articles = texts(real_data / "text", "wiki_demo.txt")
    for rows, least in ((papers, 18), (articles, len(articles))):
        others = verdicts(rows)
        pairs = list(zip(rows, others, strict=True))
        assert sum((gopher_repetition(row).rule is None) == other["repetition"] for row, other in pairs) >= least
        assert all((c4(row).rule is None) == other["c4"] for row, other in pairs)
