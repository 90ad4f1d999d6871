"""Pairs of answers: DPO and its kin, ORPO, SimPO."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llama_ft.recipe.schema_objective import Preference
from llama_ft.train.objectives.losses import dpo, log_odds, simpo
from llama_ft.train.objectives.objective import Ends, Judged, detached, real_pairs, won


class DPO:
    """Direct preference optimisation (arXiv 2305.18290) in the forms that `preference.loss` names.

    Figures: `rewards_chosen`, `rewards_rejected` (β · log-ratio), `margin` between them, `accuracy`.
    """

    name, scores, reference = "dpo", False, True

    def __init__(self, preference: Preference):
        self.preference = preference

    def judge(self, ends: Ends) -> Judged:
        said = self.preference
        beta = float(said.beta)
        chosen, rejected = ends.pairs
        ratios = ends.ratios
        if said.length_normalised or said.loss == "ipo":
            ratios = ratios / ends.lengths.clamp(min=1)
        losses = dpo(ratios[chosen] - ratios[rejected], said.loss, beta, float(said.label_smoothing))
        if said.sft_weight:
            losses = losses - float(said.sft_weight) * ends.per_token[chosen]  # arXiv 2404.19733
        rewards = beta * ratios
        return Judged(losses, _figures(ends, rewards))

    def real(self, lengths: Tensor) -> Tensor:
        return real_pairs(lengths)


class SimPO:
    """Simple preference optimisation (arXiv 2405.14734): log-probabilities per token, a target margin, no reference."""

    name, scores, reference = "simpo", False, False

    def __init__(self, preference: Preference):
        self.preference = preference

    def judge(self, ends: Ends) -> Judged:
        said = self.preference
        chosen, rejected = ends.pairs
        each = ends.per_token
        losses = simpo(each[chosen], each[rejected], float(said.beta), float(said.margin))
        if said.sft_weight:
            losses = losses - float(said.sft_weight) * each[chosen]
        return Judged(losses, _figures(ends, float(said.beta) * each))

    def real(self, lengths: Tensor) -> Tensor:
        return real_pairs(lengths)


class ORPO:
    """Odds-ratio preference optimisation (arXiv 2403.07691): the chosen answer's nll per token, and λ times the ratio.

    TRL takes the nll over the prompt as well; the paper's, and ours, is the answer's.
    """

    name, scores, reference = "orpo", False, False

    def __init__(self, preference: Preference):
        self.preference = preference

    def judge(self, ends: Ends) -> Judged:
        beta = float(self.preference.beta)
        chosen, rejected = ends.pairs
        each = ends.per_token
        odds = log_odds(each[chosen], each[rejected])
        losses = -each[chosen] - beta * F.logsigmoid(odds)
        figures = _figures(ends, beta * each) | detached({"log_odds": odds, "nll_chosen": -each[chosen]})
        return Judged(losses, figures)

    def real(self, lengths: Tensor) -> Tensor:
        return real_pairs(lengths)


def _figures(ends: Ends, rewards: Tensor) -> dict[str, Tensor]:
    chosen, rejected = (rewards[side] for side in ends.pairs)
    return detached(
        {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": won(chosen, rejected),
        }
    )
