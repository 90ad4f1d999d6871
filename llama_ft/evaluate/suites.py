"""The suites by name, and what every one of them is given: the run, the data, a place to keep what is done.

A suite is a module of this folder with one instance of a class that has the attributes of :class:`Suite`. A new one
needs a line in SUITES.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llama_ft.errors import MachineFault, Problem, UserError, did_you_mean
from llama_ft.evaluate.result import SuiteResult, file_name

if TYPE_CHECKING:
    from llama_ft.data.prepare import Prepared
    from llama_ft.evaluate.chat.judges import Judge, Judging
    from llama_ft.evaluate.subject import Subject
    from llama_ft.recipe.run import Run

SUITES = {
    "heldout": "llama_ft.evaluate.heldout:SUITE",
    "quick": "llama_ft.evaluate.quick:SUITE",
    "code": "llama_ft.evaluate.code:SUITE",
    "infilling": "llama_ft.evaluate.infilling:SUITE",
    "positions": "llama_ft.evaluate.positions:SUITE",
    "passkey": "llama_ft.evaluate.passkey:SUITE",
    "academic": "llama_ft.evaluate.academic:SUITE",
    "chat": "llama_ft.evaluate.chat.suite:SUITE",
    "judge": "llama_ft.evaluate.chat.judging:SUITE",
}
"""Where each suite is; imported when it is asked for."""

Report = Callable[[str, int, int], None]
"""Told (what is done, items done, items in all)."""
Work = Callable[[Sequence[Any], Callable[[int], None]], list[dict[str, Any]]]
"""Measures some items: their rows in the same order; told how many more items are done as they are."""


class Suite(Protocol):
    """What a suite is."""

    name: str
    about: str
    """One line for people."""
    kinds: tuple[str, ...]
    """What of `--data` it measures on: `documents`, `choices`, `code` (material.kind_of)."""

    def needs(self, context: Context) -> list[Problem]:
        """What it lacks to run, before any model is loaded; empty when all is there."""
        ...

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject. Items go through :meth:`Context.items`, so that a stopped run goes on."""
        ...


def find_suites(names: Sequence[str]) -> list[Suite]:
    """The suites of these names, each once. UserError naming all that there are none of."""
    known = [name for name, place in SUITES.items() if find_spec(place.partition(":")[0]) is not None]
    hints = {name: did_you_mean(name, known, kind="suites") for name in names if name not in known}
    if hints or not names:
        raise UserError(
            [Problem(f"no such suite '{name}'", key="--suite", hint=hint) for name, hint in hints.items()]
            or [Problem("no suite was named", key="--suite", hint=", ".join(known))]
        )
    return [_load(name) for name in dict.fromkeys(names)]


def _load(name: str) -> Suite:
    module, _, attribute = SUITES[name].partition(":")
    return getattr(import_module(module), attribute)


def stamp(path: Path) -> str:
    """Size and time of a file, which other rows change; "" for a card."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass
class Context:
    """One call of `llama-ft eval`. folder: where results go (RUN/eval). run: None for a bare model.

    data: what `--data` named, files or cards; layout: how the rows of those that hold documents are shaped; limit: most
    items of each part of a suite; seed: of samples, draws and intervals. report: for the progress line.
    samples: answers to each task of suite code, at temperature (None: the suite's own); unsandboxed: whether their
    programs run where this machine has no walls. tasks: of suite academic, see academic_tasks.py; chat: whether they
    are asked in the subject's template. max_tokens: of an answer of suite chat (None: the suite's own). judging: who
    judges such answers, and how; None: nobody. judge: the same, once it is open. lengths: tokens of the documents of
    suites positions and passkey (none: their own); infilling_tokens: of suite infilling (None: the recipe's).
    """

    folder: Path
    run: Run | None = None
    data: list[str] = field(default_factory=list)
    layout: str | None = None
    limit: int | None = None
    seed: int = 0
    report: Report = lambda what, done, total: None
    samples: int = 1
    temperature: float | None = None
    unsandboxed: bool = False
    tasks: list[str] = field(default_factory=list)
    max_tokens: int | None = None
    judging: Judging | None = None
    judge: Judge | None = None
    chat: bool = False
    lengths: list[int] = field(default_factory=list)
    infilling_tokens: list[str] | None = None
    _leaks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def prepared(self) -> Prepared | None:
        """The run's data as training saw it (opened from the cache where it still is); None for a bare model."""
        if self.run is None:
            return None
        from llama_ft.data.prepare import inspect_data

        return inspect_data(self.run.recipe)  # preflight faults were accepted when the run was trained

    def settings(self, suite: str, subject: Subject, **own: Any) -> dict[str, Any]:
        """What a result must have been measured with to be this one: the common part and the suite's `own`."""
        from llama_ft.evaluate.material import kind_of

        kinds = _load(suite).kinds
        data = {name: stamp(Path(name)) for name in self.data if kind_of(name) in kinds}
        common = {"seed": self.seed, "limit": self.limit, "data": data, "layout": self.layout}
        weights = {"weights": subject.fingerprint, "computed_in": subject.computed_in}
        return json.loads(json.dumps({"suite": suite, **common, **weights, **own}))

    def leaks(self, prompts: Mapping[str, str]) -> dict[str, Any]:
        """What the run's training rows hold of prompts (id -> text), see leaks.py; empty for a bare model."""
        if self.prepared is None:
            return {}
        from llama_ft.evaluate.leaks import find_leaks

        key = hashlib.sha256(json.dumps(list(prompts.items())).encode()).hexdigest()
        if key not in self._leaks:
            total = len(self.prepared.train)

            def tick(rows: int) -> None:
                self.report("training rows looked through for leaks", min(rows, total), total)

            self._leaks[key] = find_leaks(prompts, self.prepared, tick)
        return self._leaks[key]

    def path(self, suite: str, subject: str) -> Path:
        """Where a suite's result of a subject goes."""
        return self.folder / file_name(suite, subject)

    def items(
        self,
        subject: Subject,
        settings: dict[str, Any],
        what: str,
        items: Sequence[Any],
        work: Work,
        *,
        at_once: int = 64,
    ) -> list[dict[str, Any]]:
        """The rows of items, which each have an `id`; what an earlier, stopped call has measured is not measured again.

        what: names this part of the suite, for the progress line. work: measures some of them. at_once: items after
        which rows are kept in SUITE-SUBJECT.part.jsonl, beside the result to come. `seconds` of that work is kept too:
        see :meth:`seconds`. MachineFault if the rows cannot be written.
        """
        path = self.path(settings["suite"], subject.name)
        part = Part(path.with_suffix(".part.jsonl"), settings)
        earlier = self._earlier(path, settings)
        rows = part.read() if earlier is None else {str(row["id"]): row for row in earlier.rows} | part.read()
        missing = [item for item in items if item.id not in rows]
        done = len(items) - len(missing)

        def tick(more: int) -> None:
            nonlocal done
            done += more
            self.report(what, min(done, len(items)), len(items))

        tick(0)
        for start in range(0, len(missing), at_once):
            block = missing[start : start + at_once]
            before, began = done, time.perf_counter()
            found = work(block, tick)
            tick(before + len(block) - done)
            part.add(found, time.perf_counter() - began)
            rows.update((str(row["id"]), row) for row in found)
        return [rows[item.id] for item in items]

    def seconds(self, suite: str, subject: Subject) -> float:
        """Time that the items of a suite took, over all calls."""
        path = self.path(suite, subject.name)
        before = SuiteResult.read(path).seconds if path.is_file() else 0.0
        return before + Part.seconds(path.with_suffix(".part.jsonl"))

    def finished(self, subject: Subject, settings: dict[str, Any]) -> SuiteResult | None:
        """The result that an earlier call has written with these very settings. UserError for one of others."""
        return self._earlier(self.path(settings["suite"], subject.name), settings)

    def _earlier(self, path: Path, settings: dict[str, Any]) -> SuiteResult | None:
        """The result that is there, if it is of these very settings. UserError if it is of others: it stays until
        somebody says that it may go."""
        if not path.is_file():
            return None
        found = SuiteResult.read(path)
        if found.settings == settings:
            return found
        differing = sorted(
            key for key in settings.keys() | found.settings.keys() if settings.get(key) != found.settings.get(key)
        )
        what = f"this was measured with other settings ({', '.join(differing)})"
        raise UserError(what, where=str(path), hint="--overwrite replaces it")


@dataclass(frozen=True)
class Part:
    """SUITE-SUBJECT.part.jsonl: a first line with the settings' hash, then lines of rows as they are measured.

    One of other settings is started anew; a cut last line, of a killed process, is measured again.
    """

    path: Path
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def read(self) -> dict[str, dict[str, Any]]:
        """Rows by id."""
        lines = list(_lines(self.path))
        if not lines or lines[0].get("key") != self.key:
            with _writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps({"key": self.key}) + "\n", encoding="utf-8")
            return {}
        return {str(row["id"]): row for line in lines[1:] for row in line.get("rows", [])}

    def add(self, rows: Sequence[dict[str, Any]], seconds: float) -> None:
        """Keeps rows, in one line."""
        with _writing(self.path), self.path.open("ab+") as file:
            if file.tell() and not _ends_line(file):
                file.write(b"\n")
            file.write((json.dumps({"rows": list(rows), "seconds": seconds}) + "\n").encode())
            file.flush()

    @staticmethod
    def seconds(path: Path) -> float:
        """What the rows of a file took together."""
        return sum(float(line.get("seconds", 0.0)) for line in _lines(path))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _ends_line(file: Any) -> bool:
    file.seek(-1, 2)
    return file.read(1) == b"\n"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "make room, then start the same command again: what is measured is kept"
        raise MachineFault(f"{path} cannot be written: {error.strerror or error}", hint=hint) from error
