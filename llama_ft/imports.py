"""Imports of large libraries by a command: what is left out, and what is kept for as long as the process lives."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_good() -> Iterator[None]:
    """Keeps what is imported inside from the collector of cyclic garbage, now and later.

    torch, transformers and TRL make half a million objects, none of which ever goes away. The collector would walk
    through them again and again as they come, at each of its full rounds in training, and twice at the end: two of the
    six seconds of CPU that a trainer took to start and to stop. For the process of a command, and not for a library's
    user: all that is alive when this ends is kept (`gc.freeze`).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_out(name: str) -> None:
    """Lets the rest of this process take a library for one that is not installed, unless it has been imported already.

    For what others import wherever it lies, needed or not. `None` in sys.modules is Python's word for it: `import`
    raises ModuleNotFoundError, `importlib.util.find_spec` returns None.
    """
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    modules.setdefault(name, None)
