"""Shares of hits with Wilson's interval."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from llama_ft.evaluate.counts import counted, said, wilson


@pytest.mark.parametrize(("hits", "items"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (1, 320), (161, 320)])
def test_the_interval_is_wilsons(hits, items):
    expected = binomtest(hits, items).proportion_ci(method="wilson")
    assert wilson(hits, items) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("hits", "items"), [(0, 0), (3, 2), (-1, 4)])
def test_what_is_no_share_is_refused(hits, items):
    with pytest.raises(ValueError, match="hits of"):
        wilson(hits, items)


def test_rows_without_the_measure_are_not_counted():
    rows = [{"id": "0", "values": {"found": 1.0}}, {"id": "1", "values": {"found": 0.0}}, {"id": "2", "values": {}}]
    score = counted(rows, "found")
    assert (score.value, score.rows, score.unit, score.better) == (0.5, 2, "share", "higher")
    assert (score.low, score.high) == wilson(1, 2) and said(score) == "1 of 2"
    assert counted(rows, "lost") is None
