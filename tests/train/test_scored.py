"""How often a reward model is right, told by how clear a pair is."""

from __future__ import annotations

import torch

from llama_ft.train.scored import accuracy_by_margin


def test_by_rating_where_pairs_are_rated():
    margins = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, torch.nan])
    right = torch.tensor([0, 1, 0, 1, 1, 1, 1, 0])
    scores = torch.stack([right.float(), 1 - right.float()], dim=1)
    told = accuracy_by_margin(scores, margins)
    assert [one["by"] for one in told] == ["rating"] * (len(told) - 1) + ["all"]
    assert told[-1] == {
        "bucket": "all",
        "pairs": 8,
        "accuracy": 0.625,
        "error": round((0.625 * 0.375 / 8) ** 0.5, 4),
        "by": "all",
    }
    assert sum(one["pairs"] for one in told[:-1]) == 7  # the pair without a rating is in the last line alone
    assert told[0]["accuracy"] <= 0.5 < told[-2]["accuracy"] == 1.0


def test_by_its_own_margin_where_they_are_not():
    scores = torch.stack([torch.arange(8.0), torch.zeros(8)], dim=1)
    scores[1] = torch.tensor([0.0, 1.0])
    told = accuracy_by_margin(scores, torch.full((8,), torch.nan))
    assert [one["pairs"] for one in told] == [2, 2, 2, 2, 8]
    assert told[0]["by"] == "model" and told[0]["accuracy"] < 1.0 == told[3]["accuracy"]


def test_a_model_that_says_the_same_of_all_is_half_right():
    told = accuracy_by_margin(torch.zeros(6, 2), torch.full((6,), torch.nan))
    assert told[-1]["accuracy"] == 0.5 and len(told) == 1
    assert accuracy_by_margin(torch.zeros(0, 2), torch.zeros(0))[-1]["pairs"] == 0
