"""What preparation found: counts per source, and the faults that stop a run unless they are allowed by name."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

EXAMPLES = 5

ALLOWABLE = {
    "control-tokens": "the tokenizer lacks control tokens that the template writes",
    "end-token-unlabelled": "an answer's end token carries no loss: the model would not learn to stop",
    "two-bos": "a document has two BOS tokens in a row",
    "eval-in-train": "a held-out conversation is also in the training rows",
}
"""Preflight faults that `--allow NAME` accepts."""
NO_DOCUMENTS = "no-documents"


@dataclass
class SourceReport:
    """Counts of one source. `tokens` and `labelled` are of the kept documents alone.

    rows = kept + held_out + sum(dropped). `labelled` counts tokens that carry loss; `examples` the first few row
    numbers per drop reason.
    """

    label: str
    role: str
    rows: int = 0
    kept: int = 0
    held_out: int = 0
    truncated: int = 0
    tokens: int = 0
    labelled: int = 0
    longest: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, row: int) -> None:
        """Counts a dropped row."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        rows = self.examples.setdefault(reason, [])
        if len(rows) < EXAMPLES:
            rows.append(row)


@dataclass
class Fault:
    """A preflight fault: its name, what is wrong, the first place, what to do."""

    name: str
    what: str
    where: str | None = None
    hint: str | None = None


@dataclass
class Report:
    """The outcome of a preparation. `allowed` are the faults that this run accepted by name."""

    sources: list[SourceReport] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of :meth:`as_dict`."""
        return cls(
            [SourceReport(**one) for one in data["sources"]],
            [Fault(**one) for one in data["faults"]],
            list(data["allowed"]),
        )
