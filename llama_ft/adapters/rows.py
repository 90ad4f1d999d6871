"""A model's weights some rows at a time: what a merge, or a proof of a model that memory does not hold, reads of them.

A part is a slice of a tensor's first dimension of at most PART_BYTES in float32. The file is mapped anew for each part,
so that neither the process's own memory nor the pages that count as its own grow with a tensor. What is computed and
written again goes in blocks that stay in a core's cache: beyond it each step of it would wait for memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from safetensors import safe_open
from torch import Tensor

from llama_ft.adapters.quantised import is_projection
from llama_ft.errors import UserError
from llama_ft.llama.checkpoints.shards import Stored

PART_BYTES = 64 * 2**20
"""Bytes of the float32 rows that are mapped, or multiplied with, at once."""
BLOCK_BYTES = 2**21
"""Bytes of the float32 rows that are merged at once: W, W + s·B·A and what is written of it stay in two cores' caches.
With 64 MiB the same merge took four times as long."""
Requantise = Callable[[Tensor], Tensor]


def row_parts(shape: tuple[int, ...], limit: int | None = None) -> list[slice]:
    """Slices of the first dimension, in order, each of at most `limit` bytes in float32 or one row."""
    row = 4 * prod(shape[1:])
    step = max(1, (PART_BYTES if limit is None else limit) // row)
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def stored_rows(name: str, entry: Stored, rows: slice) -> Tensor:
    """Rows of a stored tensor in its own type, mapped from its file. UserError for one that is quantised already."""
    with safe_open(entry.file, framework="pt") as source:
        part = source.get_slice(name)[rows.start : rows.stop]
    if not part.is_floating_point():
        raise UserError(f"{name} is {part.dtype} in the base", hint="merge into the weights before quantisation")
    return part


def trained_rows(
    name: str,
    entry: Stored,
    dtype: torch.dtype,
    requantise: Requantise | None = None,
    limit: int = PART_BYTES,
) -> Iterator[tuple[slice, Tensor]]:
    """A base's weight as an adapter was trained on it: rounded to `dtype`, of a projection what `requantise` makes of
    that, float32, rows of at most `limit` bytes at a time.

    Double quantisation gives all blocks of a tensor one offset, so a weight that is requantised is held whole.
    """
    parts = row_parts(entry.shape)
    if requantise is not None and is_projection(name):
        whole = requantise(torch.cat([stored_rows(name, entry, rows).to(dtype) for rows in parts]))
        for rows in row_parts(entry.shape, limit):
            yield rows, whole[rows].float()
        return
    for rows in parts:
        mapped = stored_rows(name, entry, rows)
        for inner in row_parts(tuple(mapped.shape), limit):
            yield slice(rows.start + inner.start, rows.start + inner.stop), mapped[inner].to(dtype).float()
