"""How far a conversion is: a bar on a terminal, a plain line now and then elsewhere. Both go to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from torch import Tensor

_QUIET = 200 * 10**6
"""Bytes below which a conversion is over before anybody wonders."""
_EVERY = 10.0


def with_progress(tensors: Iterable[tuple[str, Tensor]], total: int, label: str) -> Iterator[tuple[str, Tensor]]:
    """Passes (name, tensor) through and tells how many of `total` bytes have gone by. `label`: what is being done."""
    if total < _QUIET:
        yield from tensors
    elif sys.stderr.isatty():
        yield from _bar(tensors, total, label)
    else:
        yield from _lines(tensors, total, label)


def _bar(tensors: Iterable[tuple[str, Tensor]], total: int, label: str) -> Iterator[tuple[str, Tensor]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        for name, tensor in tensors:
            yield name, tensor
            progress.advance(task, tensor.nbytes)


def _lines(tensors: Iterable[tuple[str, Tensor]], total: int, label: str) -> Iterator[tuple[str, Tensor]]:
    done, start = 0, time.monotonic()
    said = start
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.nbytes
        now = time.monotonic()
        if now - said >= _EVERY or done >= total:
            said = now
            print(
                f"{label}: {done / 10**9:.1f} of {total / 10**9:.1f} GB, {now - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
