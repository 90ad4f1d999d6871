"""One long-lived process for what may hang or die: users' reward functions, and regexes on a model's answers.

It speaks JSON lines over its pipes (called.py), lies in a session of its own, where a Ctrl-C does not reach it, and is
killed with all that it started when a call takes longer than it may.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_ft.errors import MachineFault
from llama_ft.sandbox.pipes import Lines, end_group

_CHILD = Path(__file__).with_name("called.py")


class Hung(Exception):
    """No answer within the time; the process was killed."""


class Died(Exception):
    """The process ended before it answered; the message says how."""


class Worker:
    """The process, started when it is first asked, and again after it hung or died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: Lines | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer, see called.py. Raises Hung after `seconds`, Died when it ended; both leave no process."""
        process, lines = self._started()
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps({**request, "seconds": seconds}).encode() + b"\n")
                process.stdin.flush()
            line = lines.next(seconds)
        except BaseException:  # Ctrl-C: an answer that comes late must not be taken for that of the next call
            self.close()
            raise
        if line is None:
            self.close()
            raise Hung
        if not line:
            with suppress(subprocess.TimeoutExpired):  # else it closed its pipe and goes on
                process.wait(1.0)
            raise Died(_ending(self.close()))
        return json.loads(line)

    def close(self) -> int:
        """Ends the process and all that it started. Returns its exit status, 0 for none."""
        process, self._process = self._process, None
        return 0 if process is None else end_group(process)

    def _started(self) -> tuple[subprocess.Popen[bytes], Lines]:
        if self._process is None or self._lines is None:
            pipe = subprocess.PIPE
            line = [sys.executable, "-P", "-u", str(_CHILD)]
            try:
                self._process = subprocess.Popen(line, stdin=pipe, stdout=pipe, start_new_session=True)
            except OSError as error:
                raise MachineFault(f"no process for reward functions could be started: {error}") from error
            self._lines = Lines(self._process)
        return self._process, self._lines


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended its process (exit status {status})"
    try:
        return f"ended its process ({signal.Signals(-status).name})"
    except ValueError:
        return f"ended its process (signal {-status})"
