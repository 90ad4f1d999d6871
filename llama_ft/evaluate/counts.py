"""Scores that are shares of hits: how many of how many, with Wilson's interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from llama_ft.evaluate.result import Score, pair_of

Z = 1.959964
"""Of the normal distribution, 95 % lies within ± Z."""
INTERVALS = "intervals are Wilson's"
"""What to say of scores of :func:`counted`, for a table says of itself that its intervals are a bootstrap's."""


def wilson(hits: int, items: int) -> tuple[float, float]:
    """The 95 % score interval of a share, `hits` of `items` ≥ 1: E. B. Wilson, Journal of the American Statistical
    Association 22 (1927) 209, (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n). Unlike a bootstrap it says something
    where all items hit, or none, and with few of them. ValueError for no items, or more hits than items."""
    if not 0 <= hits <= items or not items:
        raise ValueError(f"{hits} hits of {items} items")
    share, square = hits / items, Z * Z / items
    middle, reach = share + square / 2, math.sqrt(share * (1 - share) * square + square * square / 4)
    return max(0.0, (middle - reach) / (1 + square)), min(1.0, (middle + reach) / (1 + square))


def counted(rows: Sequence[dict[str, Any]], name: str) -> Score | None:
    """The share of hits (1.0, else 0.0) among all rows whose `values` hold this name; None where no row does."""
    values = [pair_of(row["values"][name])[0] for row in rows if name in row.get("values", {})]
    if not values:
        return None
    low, high = wilson(round(sum(values)), len(values))
    return Score(name, sum(values) / len(values), low, high, len(values), "share", "higher")


def said(score: Score) -> str:
    """`18 of 20`."""
    return f"{round(score.value * score.rows):,} of {score.rows:,}"
