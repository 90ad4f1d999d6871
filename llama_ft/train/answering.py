"""What every trainer on answers has in common: how a model is asked about them, who its reference is, what is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama_ft.train.objectives.reference import Reference
from llama_ft.train.trainer import LlamaTrainer

LAYOUT = ("input_ids", "position_ids", "cu_seqlens", "shared")
"""What a model reads of a batch of ends, besides which of its tokens are asked for."""


class AnswerTrainer(LlamaTrainer):
    """A trainer whose batches are answers laid out by llama_ft/data/ends.py.

    `reference`: who knows the reference's log-probabilities, found before the first step; None where there is none.
    `figures`: of the step under way, each as its sum and the number it is a sum of, float64 [2]. `temperature`: what
    logits are divided by before they become probabilities.
    """

    temperature = 1.0

    def __init__(self, *args: Any, **kwargs: Any):
        self.reference: Reference | None = None
        self.figures: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The loop; whoever is the reference leaves memory with its last step."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.reference = None

    def ask(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        """Log-probabilities of the labelled tokens, float32 [M], with gradient. The batch lies where the model does."""
        layout = {name: batch[name] for name in LAYOUT if name in batch}
        return model(**layout, rows=batch["rows"], targets=batch["targets"], temperature=self.temperature).log_probs

    @torch.no_grad()
    def said_of(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """The same without gradient and without dropout, of a batch that may lie on the host."""
        was_training = model.training
        model.eval()
        try:
            with self.accelerator.autocast():
                return self.ask(model, self._prepare_inputs(batch)).detach()
        finally:
            model.train(was_training)

    def count(self, figures: Mapping[str, Tensor]) -> None:
        """Adds sums and counts to the step's figures."""
        for name, both in figures.items():
            self.figures[name] = self.figures.get(name, torch.zeros_like(both)) + both

    def of_step(self, losses: Tensor, items: Tensor | int | None) -> Tensor:
        """The part of a step's loss that these losses are: their sum by the items of the global batch, or their own."""
        loss = losses.sum() / (max(1, len(losses)) if items is None else items)
        if items is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the engine averages gradients over ranks; we want their sum
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's figures to its line."""
        if "loss" in logs and self.figures:
            told = self.means(self.figures)
            logs |= {name: round(value, 6) for name, value in told.items() if name not in ("loss", "items")}
        super().log(logs, start_time)
