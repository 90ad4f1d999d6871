"""llama.cpp's tools run as processes of their own: what they import, and how they die, stays with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llama_ft.errors import MachineFault
from llama_ft.files import write_json

_SCRIPTS = Path(__file__).parent / "scripts"
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
    first_on_path: Path | None = None,
    grows: Path | None = None,
    to: int = 0,
) -> dict[str, Any]:
    """Runs `scripts/NAME.py` with a task in a file of JSON; returns what it wrote as its answer.

    aside: a folder for the task, the answer and its log. first_on_path: a folder whose packages come before all others.
    grows, to: the file it writes and about how many bytes that will have, for the progress shown. Raises MachineFault
    with the last lines it said when it fails or is killed; it never outlives this call.
    """
    given, answer, log = (aside / f"{script}.{kind}" for kind in ("task.json", "answer.json", "log"))
    answer.unlink(missing_ok=True)
    write_json(given, {**task, "answer": str(answer)})
    # -P: the folder of the script must not come before the packages it needs.
    command = [sys.executable, "-P", str(_SCRIPTS / f"{script}.py"), str(given)]
    with log.open("wb") as out, _Progress(what, grows, to) as progress:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=_environment(first_on_path)
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


def _environment(first: Path | None) -> dict[str, str]:
    paths = [*([str(first)] if first else []), *filter(None, [os.environ.get("PYTHONPATH")])]
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
    """How large a growing file is: a bar on a terminal, a line now and then elsewhere, both on stderr."""

    def __init__(self, label: str, file: Path | None, total: int):
        self.label, self.file, self.total = label, file, total
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
        if self.file is None or self.total < _QUIET:
            return
        done = min(self.file.stat().st_size, self.total) if self.file.exists() else 0
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done)
        elif now - self.said >= _EVERY:
            self.said = now
            far = f"{done / 10**9:.1f} of {self.total / 10**9:.1f} GB, {now - self.start:.0f} s"
            print(f"{self.label}: {far}", file=sys.stderr, flush=True)
