"""Reward models: a score for each answer of a pair, the better one's higher."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ft.recipe.schema_objective import RewardModel
from llama_ft.train.objectives.losses import ranking
from llama_ft.train.objectives.objective import Ends, Judged, detached, real_pairs, won


class Ranking:
    """The ranking loss of Llama 2 (arXiv 2307.09288), with a margin by rating where the recipe asks for it.

    Figures: `score_chosen`, `score_rejected`, `margin` between them, `accuracy`.
    """

    name, scores, reference = "reward", True, False

    def __init__(self, said: RewardModel):
        self.said = said

    def judge(self, ends: Ends) -> Judged:
        chosen, rejected = (ends.values[side] for side in ends.pairs)
        margin: Tensor | float = 0.0
        if self.said.margin and "margin" in ends.batch:
            margin = torch.nan_to_num(ends.batch["margin"].to(chosen))  # a pair without a rating asks for no margin
        losses = ranking(chosen, rejected, margin, float(self.said.center))
        figures = detached(
            {
                "score_chosen": chosen,
                "score_rejected": rejected,
                "margin": chosen - rejected,
                "accuracy": won(chosen, rejected),
            }
        )
        return Judged(losses, figures)

    def real(self, lengths: Tensor) -> Tensor:
        return real_pairs(lengths)
