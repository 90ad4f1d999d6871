"""Starts a program that ends when its parent does, with all it started: `tether.py PARENT PROGRAM ARGUMENT…`.

A server that is killed outright cannot end its engine any more; then the kernel does (prctl(2), PR_SET_PDEATHSIG). It
is asked for here, in a process of its own, and not between fork and exec of the server, whose threads may hold locks.

An engine may have workers, which outlive it: vLLM's do when it is killed, with the model in their memory. So a watcher
is left beside the program, which ends its process group once the program itself has ended, however that came.

Run as a file, by `python -I`: nothing but the standard library is needed, whatever environment the program gets.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

GRACE = 10.0
"""Seconds between asking a process group to end and ending it: vLLM's workers give their shared memory back first."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h
_POLL = 0.1


def main() -> None:
    """Ties this process to its parent, whose id comes first, and becomes the program. Not on Linux: untied."""
    parent, *line = sys.argv[1:]
    if sys.platform == "linux":
        # Not SIGTERM: vLLM ignores that while it starts. Nobody is left who could wait for a clean end.
        _die_with_parent(signal.SIGKILL)
        if os.getppid() != int(parent):
            raise SystemExit(1)  # it was gone before that was asked for
        group = os.getpgrp()
        if group == os.getpid() and os.fork() == 0:  # in another's group there is nobody to end but oneself
            _watch(group)
    try:
        os.execv(line[0], line)
    except OSError as error:
        raise SystemExit(f"{line[0]} cannot be run: {error.strerror}") from None


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, number, 0, 0, 0)


def _watch(group: int) -> None:
    """Waits for the end of the program, whose id `group` is, and ends what is left of its group."""
    try:
        os.setsid()  # out of the group, so that the group is empty when nothing of the program is left
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # whoever reads the program's output waits for its end, not for ours
            os.dup2(nowhere, stream)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        _die_with_parent(signal.SIGTERM)
        if os.getppid() == group:
            signal.sigwait({signal.SIGTERM})
        while os.getppid() == group:  # somebody else's signal
            time.sleep(_POLL)
        end_group(group)
    finally:
        os._exit(0)


def end_group(group: int) -> None:
    """Asks the processes of a group to end; after GRACE seconds ends those that are left."""
    try:
        os.killpg(group, signal.SIGTERM)
        for _ in range(round(GRACE / _POLL)):
            os.killpg(group, 0)  # ProcessLookupError once it is empty
            time.sleep(_POLL)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main()
