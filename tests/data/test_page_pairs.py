"""Preference pairs on the preview's page: alone, and in a pack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.data.test_page import view, words, written


def test_a_pair_shows_its_prompt_once_and_both_ends(tmp_path: Path) -> None:
    chosen, rejected = words("the prompt here good answer", loss=2), words("the prompt here good riddance", loss=2)
    pair = replace(chosen, rejected=rejected.tokens, rejected_ids=[*chosen.ids[:3], 10, 11], shared=3)
    page = written(tmp_path, view([pair]))
    boxes = [(a["data-from"], text) for a, text in page.seen.all("div", "tokens")]
    assert boxes == [("0", "the prompt here"), ("3", " good answer"), ("3", " good riddance")]
    assert [text for _, text in page.seen.all("h5")] == ["chosen", "rejected"]
    assert "chosen 5 tokens, 2 with loss; rejected 5 tokens, 2 with loss; 3 for both" in page.html
    assert "Kept pairs by their number of tokens" in page.html


def test_a_pack_of_pairs_lies_there_as_it_is_computed(tmp_path: Path) -> None:
    chosen, rejected = words("the prompt good answer", loss=2, row=4), words("the prompt bad", loss=1)
    pair = replace(chosen, rejected=rejected.tokens, rejected_ids=[*chosen.ids[:2], 9], shared=2)
    apart = replace(words("a b", loss=1, row=9), rejected=words("c d", loss=1).tokens, rejected_ids=[7, 8])
    page = written(tmp_path, view([], packs=[[pair, apart]]))
    assert [text for _, text in page.seen.all("p", "starts")] == [
        "cu_seqlens 0, 2, 4, 5, 7, 9",
        "shared -1, 0, 0, -1, -1",
    ]
    assert [text for _, text in page.seen.all("span", "edge")] == [
        "1 row 4 of rows.jsonl, prompt, positions 0–1",
        "2 row 4 of rows.jsonl, chosen, positions 2–3",
        "3 row 4 of rows.jsonl, rejected, positions 2–2",
        "4 row 9 of rows.jsonl, chosen, positions 0–1",
        "5 row 9 of rows.jsonl, rejected, positions 0–1",
    ]
    flow = [(a["data-from"], a["data-place"], text) for a, text in page.seen.all("span", "tokens") if "data-from" in a]
    assert flow[:3] == [("0", "0", "the prompt"), ("2", "2", " good answer"), ("2", "4", " bad")]
    assert "2 pairs, 9 tokens" in page.html and "An answer sees that part and itself" in page.html
