"""A step's documents spread over devices, so that none waits long for another: as many each, and as many tokens.

Devices wait for the slowest wherever they exchange: under FSDP2 and ZeRO-3 in every pass, under the others once a step.
Real answers differ hundredfold in length, and cells of documents as they come differ with them (docs/scaling.md).
"""

from __future__ import annotations

import numpy as np

from llama_ft.data.order import grouped_by_length

FULL = np.iinfo(np.int64).max
SILENT = 2
"""Tokens of the document that fills a step where an epoch does not divide (llama_ft.train.steps.with_silence)."""


def with_silent(column: np.ndarray, value: int = SILENT) -> np.ndarray:
    """A column of numbers, one a document, with that of the silent document behind the last."""
    return np.append(column, np.asarray(value, dtype=column.dtype))


def laid_out(
    order: np.ndarray, lengths: np.ndarray, *, packing: bool, micro_batch: int, accumulation: int, world: int
) -> np.ndarray:
    """An epoch's documents as they are trained on: each consecutive `micro_batch` of them is one device's pass.

    `order`: the mixture's, int64; each step takes the next micro_batch · accumulation · world of it, whatever comes
    out. `lengths`: tokens of every document, indexed by what is in `order`. Padded micro-batches are grouped by length,
    packed ones of several devices balanced; those of one device stay as the mixture has them. Where the epoch of
    several devices does not divide, the number len(lengths), the silent document's, fills it up, for accelerate would
    feed documents of the epoch's start again.
    """
    if not packing:
        order = grouped_by_length(order, lengths, micro_batch * accumulation * world)
    if world == 1:
        return order
    missing = -len(order) % (micro_batch * world)
    order = np.concatenate([order, np.full(missing, len(lengths), dtype=order.dtype)])
    if not packing:
        return order
    return balanced(order, with_silent(lengths), micro_batch=micro_batch, accumulation=accumulation, world=world)


def balanced(order: np.ndarray, lengths: np.ndarray, *, micro_batch: int, accumulation: int, world: int) -> np.ndarray:
    """The same documents in every step, laid so that the cells of a pass have about as many tokens each.

    `order`: indices of documents, int64, a multiple of micro_batch · world; the last step of an epoch may have fewer
    passes than `accumulation`. `lengths`: tokens of every document, indexed by what is in `order`. A cell is a
    micro-batch; in the result cell i of a step is that of device i mod world in pass i div world: accelerate deals so.

    Longest first to the emptiest cell that has room (Graham's rule of 1969, doi 10.1137/0117039, with as many documents
    for each). Cells are then ordered by tokens, so that those of one pass lie close and the largest pass comes first,
    and every other pass turns the devices' order round, which evens out what a device has over the whole step. Equal
    ones stay as they stood: the same on every device, and nothing is kept between epochs. Raises ValueError for an
    order that does not divide.
    """
    at_once = micro_batch * world
    if at_once < 1 or len(order) % at_once:
        raise ValueError(f"{len(order)} documents are no multiple of {micro_batch} × {world}")
    step = at_once * accumulation
    whole = len(order) - len(order) % step
    tokens = np.asarray(lengths, dtype=np.int64)
    parts = [part for part in (order[:whole].reshape(-1, step), order[whole:].reshape(1, -1)) if part.size]
    return np.concatenate([order[:0], *(_dealt(part, tokens[part], micro_batch, world).ravel() for part in parts)])


def _dealt(steps: np.ndarray, tokens: np.ndarray, micro_batch: int, world: int) -> np.ndarray:
    """`steps` and their `tokens`, [steps, documents], all steps at once: a turn places one document of each."""
    count, size = steps.shape
    by_length = np.argsort(-tokens, axis=1, kind="stable")
    steps, tokens = np.take_along_axis(steps, by_length, 1), np.take_along_axis(tokens, by_length, 1)
    cells, rows = size // micro_batch, np.arange(count)
    sums, open_sums = np.zeros((2, count, cells), dtype=np.int64)  # a cell that is full is open to none
    held = np.zeros((count, cells), dtype=np.int64)
    laid = np.empty((count, cells, micro_batch), dtype=steps.dtype)
    for turn in range(size):
        cell = open_sums.argmin(axis=1)
        laid[rows, cell, held[rows, cell]] = steps[:, turn]
        sums[rows, cell] += tokens[:, turn]
        held[rows, cell] += 1
        open_sums[rows, cell] = np.where(held[rows, cell] == micro_batch, FULL, sums[rows, cell])
    largest_first = np.argsort(-sums, axis=1, kind="stable")
    passes = np.take_along_axis(laid, largest_first[..., None], 1).reshape(count, -1, world, micro_batch)
    passes[:, 1::2] = passes[:, 1::2, ::-1].copy()
    return passes
