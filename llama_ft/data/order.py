"""The order of documents: a permutation per epoch that depends on the seed and the epoch alone.

Step s of an epoch takes the documents s·G … (s+1)·G of it, whatever the micro-batch, the packing or the number of
processes; and a resumed run finds the same order without replaying anything.
"""

from __future__ import annotations

import numpy as np


def document_order(documents: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(documents) as int64, from numpy's PCG64 seeded with (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(documents)
