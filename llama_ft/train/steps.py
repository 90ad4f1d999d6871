"""The order in which a run's documents come, step by step. How a step is cut is llama_ft/plan/fit.py's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Sampler

from llama_ft.data.balance import SILENT, laid_out
from llama_ft.data.mixture import Mixture
from llama_ft.data.render import MASKED
from llama_ft.plan.steps import Cut


class EpochOrder(Sampler[int]):
    """Feeds the trainer a mixture's order, laid out for the cut of its steps; accelerate tells it the epoch.

    `lengths`: tokens of every document of the mixture's sources. Nothing is kept between epochs but their number.
    """

    def __init__(self, mixture: Mixture, cut: Cut, lengths: np.ndarray, *, packing: bool):
        self.mixture, self.cut, self.lengths, self.packing, self.epoch = mixture, cut, lengths, packing, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before every pass, and after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        documents, at_once = len(self.mixture), self.cut.micro_batch * self.cut.world
        return documents if self.cut.world == 1 else -(-documents // at_once) * at_once

    def __iter__(self) -> Iterator[int]:
        order = self.mixture.order(self.epoch)
        return iter(laid_out(order, self.lengths, packing=self.packing, **asdict(self.cut)).tolist())


class PackOrder(Sampler[int]):
    """The packs of a run of `pretrain`, one after the other, whatever its epochs.

    `packs` and `cut` as :class:`EpochOrder` has them. The pack behind the last fills the last pass of all processes.
    """

    packing, epoch = True, 0

    def __init__(self, packs: Sequence[np.ndarray], cut: Cut):
        self.mixture, self.cut = packs, cut

    def set_epoch(self, epoch: int) -> None:
        """There is one."""

    def __len__(self) -> int:
        packs, at_once = len(self.mixture), self.cut.micro_batch * self.cut.world
        return packs if self.cut.world == 1 else -(-packs // at_once) * at_once

    def __iter__(self) -> Iterator[int]:
        packs = len(self.mixture)
        return iter([*range(packs), *[packs] * (len(self) - packs)])


def with_silence(documents: datasets.Dataset, times: int = 1) -> datasets.Dataset:
    """The documents and, behind the last, `times` one of two tokens (SILENT): it has no loss and changes nothing."""
    silent: dict[str, list[Any]] = {}
    for name, feature in documents.features.items():
        masked = MASKED if name.endswith("labels") else 0
        nothing: Any = "" if getattr(feature, "dtype", None) == "string" else 0
        silent[name] = [[masked] * SILENT if isinstance(feature, datasets.List) else nothing] * times
    return datasets.concatenate_datasets([documents, datasets.Dataset.from_dict(silent, features=documents.features)])


def held_out(documents: datasets.Dataset | None, cut: Cut) -> datasets.Dataset | None:
    """The documents of an evaluation, each counted once: several processes share a number that divides among them."""
    missing = -len(documents) % (cut.micro_batch * cut.world) if documents is not None and cut.world > 1 else 0
    if documents is None or not missing:
        return documents
    return with_silence(documents, missing)
