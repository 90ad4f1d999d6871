"""What lies in a run folder, read for its report: whatever is there, be the run finished, broken off or under way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama_ft.errors import UserError
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe

STATUS = "status.json"
"""Written by llama_ft.train.status."""


@dataclass
class ReportView:
    """Everything a report shows. What the folder lacks is None or empty; `unreadable` names files that are damaged.

    metrics: the lines of metrics.jsonl; written: when it was last written to.
    """

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    lock: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    recipe_text: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    proof: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    written: datetime | None = None
    unreadable: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last step that was logged; 0 before the first."""
        return max((line.get("step", 0) for line in self.metrics), default=0)

    def series(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every line that has the key, NaN and infinities too."""
        return [
            (line["step"], float(line[key]))
            for line in self.metrics
            if "step" in line and isinstance(line.get(key), int | float)
        ]


def gather(run: Run) -> ReportView:
    """Reads a run folder. What is missing or damaged raises nothing: a report of a broken run is what is left of it."""
    view = ReportView(run.path.name)
    view.metrics = _lines(run.metrics_file)
    view.written = _written(run.metrics_file)
    view.status = _json(run.path / STATUS, dict, view) or {}
    view.lock = _json(run.lock_file, dict, view) or {}
    view.samples = _json(run.samples_file, list, view) or []
    view.proof = _json(run.proof_file, dict, view)
    view.measured = _json(run.path / "measured.json", dict, view)
    view.warnings = _json(run.path / "warnings.json", list, view) or []
    view.checkpoints = run.steps()
    try:
        view.recipe_text = run.recipe_file.read_text(encoding="utf-8")
        view.recipe = run.recipe
        view.name = view.recipe.name
    except FileNotFoundError:
        pass
    except (OSError, ValueError, UserError):
        view.unreadable.append(run.recipe_file.name)
    return view


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that another process may be writing to."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _json(path: Path, kind: type, view: ReportView) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    if isinstance(found, kind):
        return found
    view.unreadable.append(path.name)
    return None


def _written(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return None
