"""What an objective is: from what a model says of answers to a loss per item, and the figures that people watch.

An item is what the loss is a mean over: a pair of answers, a judged answer, a sampled answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ends:
    """What was found of a micro-batch's answers (ends); llama_ft/data/ends.py lays them out.

    values: the policy's log-probability of each, summed over its labelled tokens, or a reward model's score, float32
    [E]. lengths: labelled tokens, int64 [E]; 0 for what only fills a step up. reference: as `values`, by the reference
    model, or None. batch: what else the collator said (`margin`, `desirable`).
    """

    values: Tensor
    lengths: Tensor
    reference: Tensor | None = None
    batch: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> Tensor:
        """Log-ratios to the reference [E]."""
        assert self.reference is not None
        return self.values - self.reference

    @property
    def pairs(self) -> tuple[slice, slice]:
        """Where the chosen and the rejected answers stand among the ends."""
        return slice(0, None, 2), slice(1, None, 2)

    @property
    def per_token(self) -> Tensor:
        """Log-probabilities per labelled token [E]."""
        return self.values / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class Judged:
    """A loss for each item, float32 [items], and figures of the same length without gradient; a NaN is not counted."""

    losses: Tensor
    figures: dict[str, Tensor]


class Objective(Protocol):
    """One way to learn from answers.

    `scores`: whether the model is a reward model; `reference`: whether the reference's log-probabilities are asked for.
    """

    name: str
    scores: bool
    reference: bool

    def judge(self, ends: Ends) -> Judged:
        """The losses of the items of some ends."""
        ...

    def real(self, lengths: Tensor) -> Tensor:
        """Which items are no filling of a step, bool [items], from the ends' lengths [E]."""
        ...


def real_pairs(lengths: Tensor) -> Tensor:
    """Which pairs are no filling: bool [pairs] from the lengths of their ends, side by side."""
    return (lengths.view(-1, 2) > 0).all(-1)


def won(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the better answer stands higher, ½ where both stand alike: a model that knows nothing gets ½."""
    return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()


def detached(figures: dict[str, Tensor]) -> dict[str, Tensor]:
    """Figures carry no gradient."""
    return {name: value.detach() for name, value in figures.items()}


@torch.no_grad()
def sums(judged: Judged, real: Tensor) -> dict[str, Tensor]:
    """Of the loss and of each figure, the sum over real items and their number, float64 [2]."""
    found = {}
    for name, column in {"loss": judged.losses.detach(), **judged.figures}.items():
        values = column[real].double()
        counted = ~values.isnan() if name != "loss" else torch.ones_like(values, dtype=torch.bool)
        found[name] = torch.stack([values[counted].sum(), counted.sum().double()])
    return found
