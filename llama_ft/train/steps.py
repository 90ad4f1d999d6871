"""The order in which a run's documents come, step by step. How a step is cut is llama_ft/plan/fit.py's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Sampler

from llama_ft.data.mixture import Mixture
from llama_ft.data.order import grouped_by_length
from llama_ft.data.render import MASKED


class EpochOrder(Sampler[int]):
    """Feeds the trainer a mixture's order; accelerate tells it the epoch.

    With `lengths`, the tokens of every document, each step's documents are grouped by length: the step holds the same
    documents, and padded micro-batches pad little. `at_once`: documents that all processes take together; where the
    epoch is no multiple of it, the number of a silent document (:func:`with_silence`) fills it up, for the launcher
    would feed documents of the epoch's start again.
    """

    def __init__(self, mixture: Mixture, global_batch: int, lengths: np.ndarray | None = None, at_once: int = 1):
        self.mixture, self.global_batch, self.lengths, self.epoch = mixture, global_batch, lengths, 0
        self.filled = -len(mixture) % at_once

    def set_epoch(self, epoch: int) -> None:
        """Called before every pass, and after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.mixture) + self.filled

    def __iter__(self) -> Iterator[int]:
        order = self.mixture.order(self.epoch)
        if self.lengths is not None:
            order = grouped_by_length(order, self.lengths, self.global_batch)
        return iter([*order.tolist(), *[sum(self.mixture.sizes)] * self.filled])


def with_silence(documents: datasets.Dataset, count: int = 1) -> datasets.Dataset:
    """The documents and, behind the last, `count` of two tokens that carry no loss and so change nothing."""
    silent: dict[str, list[Any]] = {}
    for name, feature in documents.features.items():
        masked = MASKED if name.endswith("labels") else 0
        silent[name] = [[masked] * 2 if isinstance(feature, datasets.List) else 0] * count
    return datasets.concatenate_datasets([documents, datasets.Dataset.from_dict(silent, features=documents.features)])
