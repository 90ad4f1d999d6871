"""Starts a program that ends when its parent does: `python -m llama_ft.serve.tether PARENT PROGRAM ARGUMENT…`.

A server that is killed outright cannot end its engine any more; then the kernel does (prctl(2), PR_SET_PDEATHSIG). It
is asked for here, in a process of its own, and not between fork and exec of the server, whose threads may hold locks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h


def main() -> None:
    """Ties this process to its parent, whose id comes first, and becomes the program. Not on Linux: untied."""
    parent, *line = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(parent):
            raise SystemExit(1)  # it was gone before that was asked for
    os.execv(line[0], line)


if __name__ == "__main__":
    main()
