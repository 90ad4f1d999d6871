"""Tools run as processes of their own: what they import, and how they die, stays with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_ft.errors import MachineFault
from llama_ft.files import write_json

_SCRIPTS = Path(__file__).parent / "scripts"
# -P: the folder of the script must not come before the packages it needs. -S: nor may our own packages be there at all.
_BESIDE = [sys.executable, "-P"]
ALONE = [*_BESIDE, "-S"]
"""Python without the packages of our environment; what it may import, :func:`only` says."""
_TICK = 0.1
_EVERY = 10.0
_QUIET = 200 * 10**6
"""Bytes below which nobody wonders how far it is."""
_SHOWN = 3


def run_script(
    script: str,
    task: dict[str, Any],
    aside: Path,
    *,
    what: str,
    scripts: Path | None = None,
    first_on_path: Path | None = None,
    alone_with: Sequence[Path] | None = None,
    grows: Path | None = None,
    to: int = 0,
    stage: Callable[[Path], str | None] | None = None,
) -> dict[str, Any]:
    """Runs `scripts/NAME.py` with a task in a file of JSON; returns what it wrote as its answer.

    aside: a folder for the task, the answer and its log. scripts: another folder than the one beside this file.
    first_on_path: a folder whose packages come before all others. alone_with: folders whose packages are all it sees,
    in place of our own environment. grows, to: the file it writes and about how many bytes that will have; stage: what
    its log says of how far it is, or None; both for the progress shown. Raises MachineFault with the last lines it said
    when it fails or is killed; it never outlives this call.
    """
    given, answer, log = (aside / f"{script}.{kind}" for kind in ("task.json", "answer.json", "log"))
    answer.unlink(missing_ok=True)
    write_json(given, {**task, "answer": str(answer)})
    start, surroundings = (_BESIDE, _beside(first_on_path)) if alone_with is None else (ALONE, only(alone_with))
    command = [*start, str((scripts or _SCRIPTS) / f"{script}.py"), str(given)]
    said = (lambda: stage(log)) if stage is not None else None
    with log.open("wb") as out, _Progress(what, grows, to, said) as progress:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=surroundings,
            cwd=None if alone_with is None else aside,  # some tools leave logs where they start
        )
        try:
            while process.poll() is None:
                progress.tell()
                time.sleep(_TICK)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode or not answer.is_file():
        raise MachineFault(f"{what} failed: {_reason(process.returncode, log)}", hint=_hint(process.returncode, log))
    return json.loads(answer.read_text(encoding="utf-8"))


def _beside(first: Path | None) -> dict[str, str]:
    """Of a process that has our packages, those of a folder before them."""
    paths = [*([str(first)] if first else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return _environment(paths)


def only(folders: Sequence[Path]) -> dict[str, str]:
    """The environment variables of a process of :data:`ALONE`, which imports from these folders and from no other."""
    return _environment([str(folder) for folder in folders])


def _environment(paths: list[str]) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _lines(log: Path) -> list[str]:
    """What a process said, its progress bars apart."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line.strip() for line in text.splitlines() if line.strip() and "%|" not in line]


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"it was killed ({signal.Signals(-code).name})"
    return " / ".join(_lines(log)[-_SHOWN:])[-600:] or f"it ended with {code} and said nothing"


def _hint(code: int, log: Path) -> str:
    if code == -signal.SIGKILL:
        return "was memory short? Free some and export again"
    if "No space left" in "\n".join(_lines(log)[-20:]):
        return "free some space, then export again; nothing is half-written"
    return "nothing is half-written; mend it and export again"


class _Progress:
    """How large a growing file is: a bar on a terminal, a line now and then elsewhere; or what `stage` says, as lines.

    All on stderr.
    """

    def __init__(self, label: str, file: Path | None, total: int, stage: Callable[[], str | None] | None = None):
        self.label, self.file, self.total, self.stage = label, file, total, stage
        self.said = self.start = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        if self.file is not None and self.total >= _QUIET and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def tell(self) -> None:
        """Shows how far it is, if that is due."""
        now = time.monotonic()
        if self.stage is not None and now - self.said >= _EVERY:
            self.said = now
            if far := self.stage():
                print(f"{self.label}: {far}, {now - self.start:.0f} s", file=sys.stderr, flush=True)
        if self.file is None or self.total < _QUIET:
            return
        done = min(self.file.stat().st_size, self.total) if self.file.exists() else 0
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif now - self.said >= _EVERY:
            self.said = now
            size = f"{done / 10**9:.1f} of {self.total / 10**9:.1f} GB, {now - self.start:.0f} s"
            print(f"{self.label}: {size}", file=sys.stderr, flush=True)
