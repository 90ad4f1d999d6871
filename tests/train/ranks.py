"""Several processes of one run, started one by one as srun does it: each with its rank, rank 0 keeping the store.

They call the main door (`llama_ft.train.__main__`), forked from a server that has imported torch and trl once, as
in tests/train/kills.py. A fault is put into one of them by a hook, or comes from outside as a signal.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as the main door sets it: too late in a fork of torch

from llama_ft.recipe.run import Run
from llama_ft.train.checkpoints import verify


@dataclass(frozen=True)
class Hook:
    """What is put into one process: `versions` (torch is another), `sleep` or `raise` when its n-th micro-batch is
    laid out, `die` before it connects."""

    kind: str = ""
    nth: int = 0


def install(hook: Hook) -> None:
    """Puts a fault into this process."""
    from llama_ft.data.batches import PackedCollator
    from llama_ft.train import join, together

    if hook.kind == "versions":
        real = join.versions
        join.versions = lambda *args: real(*args) | {"torch": "2.12.0"}
    elif hook.kind == "die":
        together.connect = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    elif hook.kind in ("sleep", "raise"):
        inner, calls = PackedCollator.__call__, [0]

        def collate(self: Any, documents: Any) -> Any:
            calls[0] += 1
            if calls[0] == hook.nth:
                if hook.kind == "raise":
                    raise KeyError("a field that only this machine lacks")
                time.sleep(600)
            return inner(self, documents)

        PackedCollator.__call__ = collate


def child(arguments: list[str], environment: dict[str, str], hook: Hook, log: str) -> None:
    """The main door in this process, its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    from llama_ft.train.__main__ import main

    install(hook)
    sys.argv = ["llama_ft.train", *arguments]
    main()


@dataclass
class Ranks:
    """The processes of one run in a folder, `rank-N.log` of each, and the run in `run/`."""

    folder: Path
    settings: list[str]
    world: int = 2
    port: int = 0
    processes: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["llama_ft.train.run"])
        self.port = self.port or free_port()

    def start(self, rank: int, *changes: str, hook: Hook = Hook(), **environment: str) -> None:
        """One process; `changes` are further overrides and flags of this one alone."""
        said = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
        said |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "OMP_NUM_THREADS": "1", **environment}
        arguments = ["quickstart", *self.settings, f"output_dir={self.folder / 'run'}", *changes]
        log = str(self.folder / f"rank-{rank}.log")
        process = self.context.Process(target=child, args=(arguments, said, hook, log), daemon=True)
        process.start()
        self.processes[rank] = process

    def until(self, text: str, rank: int = 0, seconds: float = 120) -> None:
        """Waits until a process has said something."""
        end = time.monotonic() + seconds
        while text not in self.said(rank):
            assert time.monotonic() < end and self.processes[rank].is_alive(), self.said(rank)
            time.sleep(0.05)

    def wait(self, seconds: float) -> dict[int, int]:
        """Exit statuses by rank, negative for a signal; fails if one is still there after so long."""
        end = time.monotonic() + seconds
        for rank, process in self.processes.items():
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} still runs after {seconds} s:\n{self.said(rank)}"
        return {rank: process.exitcode for rank, process in self.processes.items()}

    def said(self, rank: int) -> str:
        """All that a process has written."""
        log = self.folder / f"rank-{rank}.log"
        return log.read_text(encoding="utf-8") if log.exists() else ""

    def block(self) -> str:
        """The one block that all processes together have said; fails for none and for a second one."""
        everything = "".join(self.said(rank) for rank in self.processes)
        assert everything.count("llama-ft: ") == 1, everything
        assert "Traceback" not in everything, everything
        return block_of(everything)

    def whole(self) -> list[int]:
        """The steps of the checkpoints; fails for a damaged one, and for one that was left half-written under its
        name."""
        run = Run(self.folder / "run")
        for step in run.steps():
            assert verify(run.checkpoint(step)) == []
        return run.steps()

    def end(self) -> None:
        """Ends what is left."""
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
                process.join()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def block_of(text: str) -> str:
    """The block in what a process has said: its head, and the lines below it."""
    head, *lines = text[text.index("llama-ft: ") :].splitlines()
    return "\n".join([head, *itertools.takewhile(lambda line: line.startswith("  "), lines)]) + "\n"
