"""What lies in a run folder, read for its report: whatever is there, be the run finished, broken off or under way."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama_ft.errors import UserError
from llama_ft.recipe.objectives import POLICY
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe

STATUS = "status.json"
"""Written by llama_ft.train.status."""
SAMPLED = "sampled"
"""Folder of drawn answers, written by llama_ft.train.rejection and llama_ft.train.online_run."""
PROMPTS = 6
"""Prompts whose drawn answers are shown."""


@dataclass
class ReportView:
    """Everything a report shows. What the folder lacks is None or empty; `unreadable` names files that are damaged.

    metrics: the lines of metrics.jsonl; written: when it was last written to. accuracy: of a reward model, by margin;
    best_of_k and sampled: of a run that samples, the mean of the best of k answers, and some prompts with theirs.
    """

    name: str
    metrics: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    lock: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    recipe_text: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)
    accuracy: list[dict[str, Any]] = field(default_factory=list)
    best_of_k: list[dict[str, Any]] = field(default_factory=list)
    sampled: list[dict[str, Any]] = field(default_factory=list)
    proof: dict[str, Any] | None = None
    measured: dict[str, Any] | None = None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    written: datetime | None = None
    unreadable: list[str] = field(default_factory=list)

    @property
    def objective(self) -> str | None:
        """What was optimised; None where the recipe cannot be read."""
        return None if self.recipe is None else self.recipe.training.objective

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

    def names(self, prefix: str) -> list[str]:
        """What stands behind a prefix in the keys of any line, each once, in the order they came."""
        found = (key.removeprefix(prefix) for line in self.metrics for key in line if key.startswith(prefix))
        return list(dict.fromkeys(found))


def gather(run: Run) -> ReportView:
    """Reads a run folder. What is missing or damaged raises nothing: a report of a broken run is what is left of it."""
    view = ReportView(run.path.name)
    view.metrics = _lines(run.metrics_file)
    view.written = _written(run.metrics_file)
    view.status = _json(run.path / STATUS, dict, view) or {}
    view.lock = _json(run.lock_file, dict, view) or {}
    view.samples = _json(run.samples_file, list, view) or []
    view.accuracy = _json(run.path / "eval" / "accuracy.json", list, view) or []
    view.best_of_k = _json(run.path / SAMPLED / "best_of_k.json", list, view) or []
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
    view.sampled = _some_lines(run.path / SAMPLED / "answers.jsonl", ends=view.objective in POLICY)
    return view


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that another process may be writing to."""
    found = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        record = _record(line)
        if record is not None:
            found.append(record)
    return found


def _some_lines(path: Path, *, ends: bool) -> list[dict[str, Any]]:
    """PROMPTS lines of a file that may be larger than memory: the first and the last, or spread over all of them."""
    try:
        with path.open("rb") as file:
            places, at = [], 0
            for line in file:
                places += [at] if line.endswith(b"\n") else []  # the last line of a killed run may be cut
                at += len(line)
            if ends:
                half = PROMPTS // 2
                chosen = places if len(places) <= PROMPTS else [*places[:half], *places[-half:]]
            else:
                count = min(PROMPTS, len(places))
                chosen = [places[i * len(places) // count] for i in range(count)]
            found = []
            for place in chosen:
                file.seek(place)
                found.append(_record(file.readline().decode(errors="replace")))
    except OSError:
        return []
    return [record for record in found if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    """A line of JSON; None for the last line of a killed run, and for what is no object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


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
