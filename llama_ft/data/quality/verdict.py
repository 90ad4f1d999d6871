"""What a quality step says of a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`text`: what is left of it. `rule`: why it is dropped, in words that are the same for all texts, or None.

    `changed`: rules that took something out of a text which stays.
    """

    text: str
    rule: str | None = None
    changed: tuple[str, ...] = ()


Judge = Callable[[str], Verdict]
"""A step: a text in, a verdict out. Depends on nothing else."""
