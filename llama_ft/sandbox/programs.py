"""Programs that nobody has read, each run in a process behind walls.

What a program may do is settled by the kernel, from within its process before its first line (walled.py): it computes,
reads files, and nothing else. A single bit comes back, so no secret leaves with it. What no wall helps against is code
that cheats the tests in its own process: objects that equal everything pass every `assert`.
"""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from llama_ft.errors import MachineFault, UserError
from llama_ft.plan.hardware import usable_cores
from llama_ft.sandbox.pipes import Lines, end_group
from llama_ft.sandbox.walled import MEMORY, OPEN_FILES, Standing

Outcome = Literal["passed", "failed", "timeout"]

THREADS = 256
"""Threads of one program. Root is bound by no limit of the kernel, and small stacks would leave room for 30,000."""
_LOOK = 0.05
"""Seconds between two looks at how many there are."""
START = 60.0
"""Seconds until the walls must stand; an idle machine takes 0.02."""
_CHILD = Path(__file__).with_name("walled.py")
_ANSWER = 256
"""Bytes that are read back at the most: what else is written there is the program's own doing."""


@dataclass(frozen=True)
class Wall:
    """One thing that keeps a program in. `stands`: on this machine; `what`: what it does, or does not let through."""

    name: str
    stands: bool
    what: str


@cache
def walls() -> tuple[Wall, ...]:
    """The walls as a trial program met them on this machine. MachineFault when not even that could be run."""
    with _started(["pass"], 5.0, bare=False) as trial:
        stands = trial.standing
    lost = "no files are written or changed, no connections, no other processes, no signals to them"
    return (
        Wall("system calls", stands.filtered, f"seccomp lets through what computing takes: {lost}"),
        Wall("Landlock", stands.confined, "files, TCP and signals once more, and no look into /proc"),
        Wall("namespaces", stands.apart, "user, network and IPC of its own: no rights of root outside of them"),
        Wall(
            "limits",
            True,
            f"{MEMORY >> 30} GiB of memory, {OPEN_FILES} open files, {THREADS} threads, seconds of CPU and clock",
        ),
        Wall("interpreter", True, "python -I -S: the standard library alone, empty environment, no input, no output"),
    )


class Sandbox:
    """Runs programs, several at once: one for each core that this process may use, or `processes`.

    UserError where the machine has no filter for system calls (Linux on x86-64 and 64-bit ARM has), unless `bare`: then
    programs run all the same, with the rights of whoever started this. `hint`: how a user says so, if there is a way.
    """

    def __init__(self, processes: int | None = None, *, bare: bool = False, hint: str | None = None):
        if not bare and not next(wall for wall in walls() if wall.name == "system calls").stands:
            raise UserError(
                f"code cannot be walled in on this machine ({os.uname().sysname} on {os.uname().machine})",
                hint="it takes Linux with seccomp, on x86-64 or 64-bit ARM; a container may forbid it"
                + (f"; {hint}" if hint else ""),
            )
        self.bare = bare
        self._threads = ThreadPoolExecutor(processes or usable_cores(), "sandbox")

    def run(self, programs: Sequence[Sequence[str]], seconds: float) -> list[Outcome]:
        """How each program ended. Its parts run one after the other in one module, each read by itself.

        passed: all of it ran to its end; failed: it raised, exited, died or asked for too much; timeout: it took more
        than `seconds`. Nothing that a program does is raised here; MachineFault when no process can be started.
        """
        return list(self._threads.map(lambda parts: run_walled(parts, seconds, bare=self.bare), programs))

    def close(self) -> None:
        """Waits for what still runs; what has not begun does not begin."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_walled(parts: Sequence[str], seconds: float, *, bare: bool = False) -> Outcome:
    """One program, see :meth:`Sandbox.run`."""
    with _started(parts, seconds, bare=bare) as started:
        end, said = time.monotonic() + seconds, None
        while said is None and (left := end - time.monotonic()) > 0:
            said = started.lines.next(min(_LOOK, left))
            if said is None and _threads(started.pid) > THREADS:
                return "failed"
    if said is None:
        return "timeout"
    return "passed" if said == started.mark else "failed"


def _threads(pid: int) -> int:
    """Threads of a process; 0 where there is no /proc to tell."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0


@dataclass(frozen=True)
class _Started:
    """`standing`: its walls; `mark`: what it says when all has run."""

    pid: int
    lines: Lines
    standing: Standing
    mark: bytes


@contextmanager
def _started(parts: Sequence[str], seconds: float, *, bare: bool) -> Iterator[_Started]:
    """A process that has put up its walls; it and all of its group are gone afterwards."""
    # The mark is in neither half alone: what echoes all that it can read has not got it.
    key, challenge = secrets.randbits(128), secrets.randbits(128)
    written = [part.encode(errors="replace") for part in parts]
    head = b" ".join([b"%d %d %x" % (math.ceil(seconds) + 1, bare, key), *(b"%d" % len(part) for part in written)])
    # What the dynamic linker needs to start this very Python, where it needs anything.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    line = [sys.executable, "-I", "-S", str(_CHILD), str(os.getpid())]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen(
            line, stdin=pipe, stdout=pipe, stderr=nowhere, cwd="/", env=environment, start_new_session=True
        )
    except OSError as error:
        raise _not_started(str(error)) from error
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(head + b"\n" + b"".join(written) + b"%x" % challenge)
            process.stdin.close()
        lines = Lines(process, _ANSWER)
        first = (lines.next(START) or b"").split()
        if len(first) != 4 or first[0] != b"walled":
            raise _not_started(f"exit status {end_group(process)}")
        yield _Started(process.pid, lines, Standing(*(one == b"1" for one in first[1:])), b"%x" % (key ^ challenge))
    finally:
        end_group(process)


def _not_started(reason: str) -> MachineFault:
    hint = "is memory short, or the number of processes limited? Then go on with --resume"
    return MachineFault(f"no process for code could be started: {reason}", hint=hint)
