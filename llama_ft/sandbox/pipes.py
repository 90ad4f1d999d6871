"""What other processes write, read line by line and never waited for longer than asked; and their end."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress


class Lines:
    """Lines out of a process's output pipe. `most`: bytes that a line may have; a longer one is the end."""

    def __init__(self, process: subprocess.Popen[bytes], most: int = 1 << 16):
        assert process.stdout is not None
        self._source = process.stdout.fileno()
        self._most = most
        self._held = b""

    def next(self, seconds: float) -> bytes | None:
        """The next line without its end, b"" where no whole one comes any more, None when `seconds` have passed."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._source, selectors.EVENT_READ)
            while b"\n" not in self._held:
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                more = os.read(self._source, self._most)
                self._held += more
                if not more or len(self._held) > self._most:
                    return b""
        line, _, self._held = self._held.partition(b"\n")
        return line


def end_group(process: subprocess.Popen[bytes]) -> int:
    """Kills a process that was started in a session of its own, with all of its group. Returns its exit status."""
    if process.stdout is not None and process.stdout.closed:  # it was ended before: its number may be another's by now
        return process.wait()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # it did not read all that was written
                stream.close()
    return status
