"""Judged answers: KTO (arXiv 2402.01306), which asks of each answer alone whether it was liked."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ft.recipe.schema_objective import Preference
from llama_ft.train.objectives.losses import kto
from llama_ft.train.objectives.objective import Ends, Judged, detached


class KTO:
    """Kahneman-Tversky optimisation. Where the policy stands, z, is estimated over all documents of a step.

    The micro-batch that an answer happens to be in does not move its loss: z is settled before the step's first pass,
    from the log-ratios of answers that belong to other prompts. Figures: `rewards_chosen` and `rewards_rejected` (NaN
    for answers of the other kind), `kl`.
    """

    name, scores, reference = "kto", False, True

    def __init__(self, preference: Preference):
        self.preference = preference
        self.kl = 0.0

    def settle(self, ratios: float, count: float) -> None:
        """Sets z from the sum of the log-ratios of `count` answers to prompts that are not theirs."""
        self.kl = max(0.0, ratios / count) if count else 0.0

    def judge(self, ends: Ends) -> Judged:
        said = self.preference
        beta, desirable = float(said.beta), ends.batch["desirable"].to(ends.values.device)
        ratios = ends.ratios
        weights = (float(said.desirable_weight), float(said.undesirable_weight))
        losses = kto(ratios, self.kl, desirable, beta, weights)
        rewards = beta * ratios
        figures = {
            "rewards_chosen": _only(rewards, desirable),
            "rewards_rejected": _only(rewards, ~desirable),
            "kl": torch.full_like(rewards, self.kl),
        }
        return Judged(losses, detached(figures))

    def real(self, lengths: Tensor) -> Tensor:
        return lengths > 0


def _only(values: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, values, torch.full_like(values, torch.nan))
