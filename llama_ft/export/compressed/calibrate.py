"""The documents that AWQ, GPTQ and SmoothQuant look at: the run's own, rendered as in training."""

from __future__ import annotations

from llama_ft.data.prepare import Prepared

DOCUMENTS = 256
"""Documents at most: half of llm-compressor's default, which is for a model's whole language."""
LONGEST = 1024
"""Tokens of a document at most."""


def choose_rows(prepared: Prepared) -> list[list[int]]:
    """Ids of up to DOCUMENTS training documents, spread evenly over all, each cut at LONGEST; the same every time.

    Held-out documents are not among them: they are what the proof asks.
    """
    count = len(prepared.train)
    chosen = min(count, DOCUMENTS)
    picked = prepared.train.select([number * count // chosen for number in range(chosen)])
    return [[int(token) for token in row["input_ids"][:LONGEST]] for row in picked]
