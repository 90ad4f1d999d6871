"""How probable the end token is where held-out answers end: a model that has not learnt it does not stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from llama_ft.data.batches import PackedCollator
from llama_ft.data.prepare import Prepared
from llama_ft.data.render import MASKED

DOCUMENTS = 16
"""Held-out documents that are looked at: one micro-batch or a few, beside the whole set of an evaluation."""


@dataclass(frozen=True)
class EndToken:
    """The first held-out documents in which an end token carries loss, with all their other labels taken away."""

    documents: list[dict[str, Any]]
    ends: int

    @classmethod
    def of(cls, prepared: Prepared) -> EndToken | None:
        """None without held-out documents, or where none of them has a labelled end token."""
        end = prepared.template.end_token_id(prepared.tokenizer)
        documents, ends = [], 0
        for row in (
            prepared.eval.with_format("numpy").select(range(min(DOCUMENTS, len(prepared.eval))))
            if prepared.eval
            else ()
        ):
            labels = row["labels"].copy()
            labels[labels != end] = MASKED
            labels[0] = MASKED  # predicted by nothing
            if end is not None and (labels == end).any():
                documents.append({"input_ids": row["input_ids"], "labels": labels})
                ends += int((labels == end).sum())
        return cls(documents, ends) if documents else None

    @torch.no_grad()
    def probability(self, trainer: Any) -> float:
        """exp of the mean log-probability at those places: 1 for a model that always ends where the answer did.

        Every process measures the same documents, so that sharded weights are gathered by all of them at once.
        """
        model = trainer.model_wrapped if trainer.accelerator._models else trainer.model
        was_training = model.training
        model.eval()
        at_once = trainer.args.per_device_eval_batch_size
        total = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
        for start in range(0, len(self.documents), at_once):
            batch = PackedCollator()(self.documents[start : start + at_once])
            total += model(**trainer._prepare_inputs(batch), num_items_in_batch=1).loss.double()
        model.train(was_training)
        return math.exp(-float(total) / self.ends)
