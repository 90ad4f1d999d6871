"""The loss of each source of a mixture, step by step: what the whole loss hides when one part gets worse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ft.data.render import MASKED
from llama_ft.recipe.schema import Data, Recipe
from llama_ft.train.guards import documents_of

Origins = Sequence[tuple[int, ...]]


class BySource:
    """Nats, labelled tokens and tokens of each source since they were last asked for, on this process.

    labels: what each source is called. The trainer calls `begin` with the micro-batches of a step, then `add` once for
    each of them, in their order.
    """

    def __init__(self, labels: Sequence[str], device: torch.device):
        self.labels = list(labels)
        self.nats = torch.zeros(len(self.labels), dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, len(self.labels), dtype=torch.int64)
        self.waiting: list[Tensor] = []

    @classmethod
    def of(cls, sources: Sequence[Data], device: torch.device) -> BySource | None:
        """For the sources of a recipe; None for a single one, whose loss is the loss."""
        return cls(names_of(sources), device) if len(sources) > 1 else None

    def begin(self, batches: Sequence[tuple[dict[str, Any], Origins]]) -> None:
        """Counts a step's micro-batches, each with where its documents came from."""
        self.waiting = [self.count(batch, origins) for batch, origins in batches]

    def count(self, batch: dict[str, Any], origins: Origins) -> Tensor:
        """Adds the tokens of a micro-batch; the source of each of its documents, int64 on the host, if they know it."""
        if not origins:
            return torch.empty(0, dtype=torch.int64)
        sources = torch.tensor([origin[0] for origin in origins], dtype=torch.int64)
        parts = (labels for _, labels in documents_of(batch))
        sizes = torch.tensor([[int((labels[1:] != MASKED).sum()), len(labels)] for labels in parts])
        self.counts.index_add_(1, sources, sizes.T)
        return sources

    def add(self, document_losses: Tensor, sources: Tensor | None = None) -> None:
        """One micro-batch's nats by document, [documents]. Nothing is read: that would wait for the device."""
        sources = self.waiting.pop(0) if sources is None else sources
        if len(sources):
            self.nats.index_add_(0, sources.to(self.nats.device), document_losses.detach().double())

    def take(self, accelerator: Any) -> dict[str, dict[str, float]]:
        """`loss`: nats per labelled token, and `tokens` of every source over all processes since the last call.

        A source that was not drawn has no loss. Called by every process.
        """
        own = torch.cat([self.nats[None], self.counts.to(self.nats)])
        nats, labelled, tokens = accelerator.reduce(own, "sum").tolist()
        self.nats.zero_()
        self.counts.zero_()
        found = zip(self.labels, nats, labelled, strict=True)
        losses = {label: sum_ / count for label, sum_, count in found if count}
        return {"loss": losses, "tokens": {label: int(n) for label, n in zip(self.labels, tokens, strict=True)}}


def names_of(sources: Sequence[Data]) -> list[str]:
    """Short names of a recipe's sources, no two alike: the card's, or the file's without its folder."""
    names = [source.use or Path(source.path or "?").name for source in sources]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def evaluated_sources(recipe: Recipe) -> Sequence[Data]:
    """The sources of an evaluation: those of eval_data, or of what a share was held out of."""
    return recipe.eval_data if isinstance(recipe.eval_data, list) else recipe.data
