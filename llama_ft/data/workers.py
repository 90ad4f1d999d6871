"""Chunks made by several processes at once, in order.

The processes are plain children that speak pickles over their pipes: nothing is forked from a process that may hold
threads, locks or a GPU, and no user's script is imported again. A small set never starts one.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any, Generic, Protocol, TypeVar

from llama_ft.data.documents import CHUNK, Row, in_chunks
from llama_ft.data.problems import Problems
from llama_ft.data.sources import Source
from llama_ft.errors import MachineFault

ALONE = 4
"""Chunks that this process makes itself before it asks for help: other processes take seconds to start."""
MOST = 16
"""Processes at the most: beyond, reading the file and writing the result take as long as what they do."""
AHEAD = 2
"""Chunks per process that may be under way or waiting to be written: enough to keep all busy, memory stays flat."""


Made = TypeVar("Made")
Made_co = TypeVar("Made_co", covariant=True)


class Maker(Protocol[Made_co]):
    """What makes something of a chunk of rows, in any process: it and what it makes are picklable."""

    def make(self, source: Source, number: int, rows: list[Row]) -> Made_co:
        """Of `rows`, which belong to source number `number`."""
        ...


class Workers(Generic[Made]):
    """Processes that make chunks; a context manager. `processes`: how many at the most, None for one per core."""

    def __init__(self, maker: Maker[Made], sources: list[Source], processes: int | None = None):
        self._maker = maker
        self._sources = sources
        self._count = processes if processes is not None else min(len(os.sched_getaffinity(0)), MOST)
        self._children: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._made = 0

    def __enter__(self) -> Workers[Made]:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()  # idle, or making a chunk that nobody wants any more
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for child in self._children:
            child.wait()

    def chunks(self, number: int, problems: Problems) -> Iterator[Made]:
        """The chunks of source `number`, in order. What is wrong with its file is noted in `problems`."""
        source = self._sources[number]
        waiting: deque[Future[Made]] = deque()
        for chunk in in_chunks(source, problems, CHUNK):
            if self._made < ALONE or self._count < 2:
                self._made += 1
                yield self._maker.make(source, number, chunk)
                continue
            waiting.append(self._pool().submit(self._ask, number, chunk))
            if len(waiting) > AHEAD * self._count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _pool(self) -> ThreadPoolExecutor:
        """One thread per child, which only waits for it."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._count)
            start = pickle.dumps((self._maker, self._sources), pickle.HIGHEST_PROTOCOL)
            for _ in range(self._count):
                child = _start()
                self._children.append(child)
                self._threads.submit(self._open, child, start)
        return self._threads

    def _open(self, child: subprocess.Popen[bytes], start: bytes) -> None:
        assert child.stdin is not None
        with suppress(OSError):  # a child that is gone already is noticed by whoever asks it first
            child.stdin.write(start)
            child.stdin.flush()
        self._idle.put(child)

    def _ask(self, number: int, rows: list[Row]) -> Made:
        child = self._idle.get()
        try:
            assert child.stdin is not None and child.stdout is not None
            pickle.dump((number, rows), child.stdin, pickle.HIGHEST_PROTOCOL)
            child.stdin.flush()
            answer: Any = pickle.load(child.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            child.kill()  # its pipes are no use any more, whatever became of it
            what = f"a process that prepares data ended (exit status {child.wait()})"
            hint = "was memory short? Start again: nothing half made is kept"
            raise MachineFault(what, hint=hint) from error
        finally:
            self._idle.put(child)  # also a dead one: whoever waits for a child must not wait for ever
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _start() -> subprocess.Popen[bytes]:
    # One core each: the tokenizer's own threads would fight over them.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # The modules of this process, and none that happen to lie in the working directory.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    line = [sys.executable, "-P", "-c", "from llama_ft.data.workers import serve; serve()"]
    # In a session of its own, where a Ctrl-C does not reach it: the process that asked decides what becomes of it.
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdin=pipe, stdout=pipe, env=environment, start_new_session=True)


def serve() -> None:
    """What a child does: the maker and the sources first, then rows in and chunks out, until its input ends."""
    rows_in: IO[bytes] = sys.stdin.buffer
    chunks_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write between two pickles
    with suppress(EOFError, pickle.UnpicklingError):  # the other side is done, or gone
        maker, sources = pickle.load(rows_in)
        while True:
            number, rows = pickle.load(rows_in)
            answer(maker, sources[number], number, rows, chunks_out)


def answer(maker: Maker[Any], source: Source, number: int, rows: list[Row], out: IO[bytes]) -> None:
    """Makes a chunk and writes it, or the error for the other side to raise as its own."""
    try:
        made: Any = maker.make(source, number, rows)
    except Exception as error:
        made = error
    try:
        pickle.dump(made, out, pickle.HIGHEST_PROTOCOL)
        out.flush()
    except BrokenPipeError:  # nobody waits for it any more
        os._exit(1)
