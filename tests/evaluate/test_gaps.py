"""Gaps that suite `infilling` draws."""

from __future__ import annotations

import pytest

from llama_ft.evaluate.gaps import AFTER, BEFORE, LONGEST, SHORTEST, WINDOW, draw_lines, draw_spans
from llama_ft.evaluate.suites import Context
from llama_ft.evaluate.texts import Text, read_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[Text]:
    """Real modules: those that python-files holds out."""
    return read_texts(Context(tmp_path_factory.mktemp("eval")))


@pytest.mark.parametrize("draw", [draw_spans, draw_lines])
def test_gaps_are_places_of_their_text(texts, draw):
    wholes = {text.id: text.text for text in texts}
    gaps = draw(texts, 100, 0)
    assert len(gaps) == len({gap.id for gap in gaps}) == 100
    for gap in gaps:
        name = gap.id.partition(":")[2]
        whole = wholes[name.rpartition("@" if "@" in name else ".")[0]]
        assert gap.prefix + gap.middle + gap.suffix in whole and gap.middle.strip()
        assert gap.asked.replace("█", gap.middle) in whole
        assert len(gap.prefix) <= max(WINDOW, BEFORE) and len(gap.suffix) <= max(WINDOW, AFTER)
        assert not gap.prefix or whole.startswith(gap.prefix) or f"\n{gap.prefix}" in whole, "it begins with a line"


def test_lines_are_whole_short_and_different(texts):
    gaps = draw_lines(texts, 320, 0)
    assert len(gaps) == 320
    for gap in gaps:
        assert SHORTEST <= len(gap.middle) <= LONGEST and gap.middle == gap.middle.strip()
        assert not gap.prefix.rpartition("\n")[2].strip(), "before it stands its indentation alone"
        assert not gap.suffix or gap.suffix.partition("\n")[0].strip() == ""
    of_a_text = [gap.middle for gap in gaps if gap.id.rpartition("@")[0] == gaps[0].id.rpartition("@")[0]]
    assert len(of_a_text) == len(set(of_a_text)) > 5


def test_every_text_gives_as_many_as_it_can():
    long, short = "".join(f"value_{i} = {i}\n" for i in range(99)), "one_line = 1\ntwo_lines = 2\n"
    gaps = draw_lines([Text("a:0", long), Text("b:0", short)], 7, 0)
    assert [gap.id[:8] for gap in gaps].count("line:b:0") == 2 and len(gaps) == 7
    assert len(draw_lines([Text("b:0", short)], 7, 0)) == 2
    # a text of one window gives one span, whatever is asked for; white space is none
    assert len(draw_spans([Text("b:0", short)], 7, 0)) == 1
    assert draw_spans([Text("c:0", " \n" * 300)], 7, 0) == []


@pytest.mark.parametrize("draw", [draw_spans, draw_lines])
def test_the_seed_and_the_text_alone_decide(texts, draw):
    alone = {gap.id: gap for gap in draw(texts[2:3], 3, 0)}
    together = {gap.id: gap for gap in draw(texts, 3 * len(texts), 0)}
    assert all(together[name] == gap for name, gap in alone.items())
    assert draw(texts, 20, 0) == draw(texts, 20, 0) != draw(texts, 20, 1)
