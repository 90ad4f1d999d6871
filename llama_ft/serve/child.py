"""An engine as a child process: started, waited for, watched, and ended with all that it started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from llama_ft.errors import MachineFault
from llama_ft.serve import tether

_TAIL = 64 * 1024
_SHOWN = 15
_CAUSES, _WIDE = 3, 400
_RAISED = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .+)")
"""The last line of a traceback; a log's own words may stand before it."""


def free_port() -> int:
    """A port of the loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Child:
    """One engine. The end of what it writes is kept for the message when it fails; `echo` shows all of it on stderr."""

    def __init__(self, title: str, process: asyncio.subprocess.Process, echo: bool):
        self.title, self.process = title, process
        self._tail = b""
        self._reading = asyncio.create_task(self._read(echo))

    @classmethod
    async def start(
        cls, title: str, line: list[str], *, folder: Path, environment: Mapping[str, str], echo: bool = False
    ) -> Child:
        """Starts `line` in `folder`, in a session of its own: Ctrl-C on the terminal is ours to pass on.

        The child dies with this process, however that ends (on Linux). `environment` is all it gets of ours: what ties
        it is a file that needs none of it.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", tether.__file__, str(os.getpid()), *line),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=folder,
            env=dict(environment),
            start_new_session=True,
        )
        return cls(title, process, echo)

    async def _read(self, echo: bool) -> None:
        assert self.process.stdout is not None
        while piece := await self.process.stdout.read(4096):
            self._tail = (self._tail + piece)[-_TAIL:]
            if echo:
                print(piece.decode("utf-8", "replace"), end="", file=sys.stderr, flush=True)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.process.returncode is None

    def said(self) -> str:
        """The last lines that it wrote, and before them what was raised earlier: a cause, where others fell later."""
        lines = [line.rstrip() for line in self._tail.decode("utf-8", "replace").splitlines() if line.strip()]
        earlier, last = lines[:-_SHOWN], lines[-_SHOWN:]
        raised = list(dict.fromkeys(found[1][:_WIDE] for line in earlier if (found := _RAISED.search(line))))
        return "\n".join(f"    {line}" for line in [*raised[-_CAUSES:], *last])

    async def ended(self) -> MachineFault:
        """Waits for its end, which nobody asked for, and says what is known of it."""
        status = await self.process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._reading), 2)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        said = self.said()
        return MachineFault(f"{self.title} {how}" + (f"; its last words:\n{said}" if said else ""))

    async def stop(self) -> None:
        """Asks it to end, then ends it, and what it started with it."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), tether.GRACE)
        self._signal(signal.SIGKILL)
        await self.process.wait()
        # Its session is its process group, whose id is its own; others in it outlive it at times (vLLM's workers).
        await asyncio.to_thread(tether.end_group, self.process.pid)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.alive:
                self.process.send_signal(number)
