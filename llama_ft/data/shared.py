"""What two answers to one prompt have in common, and what it costs to compute that once. No torch here.

A causal model says the same of a prompt whichever answer follows, so a pair's prompt is laid out once
(llama_ft/data/ends.py), and a pair costs prompt + chosen + rejected tokens where two documents cost the prompt twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llama_ft.data.render import MASKED

if TYPE_CHECKING:
    import datasets


def first_labelled(labels: np.ndarray) -> int:
    """Index of the first token with loss; the number of tokens where none has."""
    found = np.flatnonzero(labels != MASKED)
    return int(found[0]) if len(found) else len(labels)


def in_common(ids: np.ndarray, labels: np.ndarray, other_ids: np.ndarray, other_labels: np.ndarray) -> int:
    """Tokens at the start of two documents that can be computed once: equal in both, and without loss in both.

    Ids and labels are integers [tokens] of each. Less than either's length: both keep an end of their own, if only a
    token of one that has no loss at all. 0 where they begin differently, or with loss.
    """
    most = min(len(ids), len(other_ids))
    differ = np.flatnonzero(ids[:most] != other_ids[:most])
    equal = int(differ[0]) if len(differ) else most
    return max(0, min(equal, first_labelled(labels), first_labelled(other_labels), most - 1))


def labelled_of(labels: np.ndarray) -> int:
    """Tokens that carry loss. The first token of a document never does: nothing predicts it."""
    return int(np.count_nonzero(labels[1:] != MASKED))


def whole_lengths(pairs: datasets.Dataset) -> np.ndarray:
    """Tokens of prompt + chosen and of prompt + rejected of prepared pairs: int64 [pairs, 2], ids are not read."""
    import pyarrow.compute as pc

    columns = [pairs.data.column(name) for name in ("input_ids", "rejected_ids")]
    return np.stack([pc.list_value_length(column).to_numpy() for column in columns], axis=1).astype(np.int64)


def saved_by_sharing(pairs: datasets.Dataset) -> float:
    """Share of the tokens of prepared pairs that need not be computed because a prompt is laid out once."""
    whole = int(whole_lengths(pairs).sum())
    return 1.0 - int(pairs.data.column("length").to_numpy().sum()) / whole if whole else 0.0
