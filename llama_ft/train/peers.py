"""The processes of a run look after one another: one that is lost, or stands still, ends all, and is named.

Two threads in each process. One speaks: every second it leaves a beat on the board that they met on
(:mod:`llama_ft.train.join`), how far its main thread is, and reads what the others left. Rank 0 reads the beats of all
and judges; the others read its verdict, and judge rank 0. The other thread watches the first, which waits without end
where the way to the board is cut.

The main thread may stand in an exchange with a process that is gone, where no exception and no signal reaches it. So
the one that concludes tells, writes status.json and ends the process. What lies on the disk is whole at any moment.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psutil

from llama_ft.files import write_json
from llama_ft.recipe.run import Run
from llama_ft.train.headway import Follow, Headway
from llama_ft.train.join import HEARD, Company
from llama_ft.train.launch import report_status
from llama_ft.train.page.gather import STATUS
from llama_ft.train.stacks import whereabouts, write_stacks
from llama_ft.train.stop import STOPPED, StopCleanly
from llama_ft.train.store import DistError
from llama_ft.train.verdict import GRACE, LOST, SOON, WRITTEN, Seen, Verdict, judge

BEAT = 1.0
"""Seconds between two signs of life."""


class Peers:
    """The watch of one process. `start` and `leave` are called once, `watch` when there is a trainer."""

    def __init__(self, company: Company, run: Run, stop: StopCleanly, stall: float):
        self.company, self.run, self.stop, self.stall = company, run, stop, stall
        self.place, self.board = company.place, company.board
        self.headway = Headway()
        self.trainer: Any = None
        self.evidence: float | None = None
        self.ended = False
        self._first = threading.Lock()
        self._over = threading.Event()
        self._leaving: int | None = None
        self._started = time.time()
        self._number = 0
        self._seen: dict[int, Seen] = {}
        self._calm: float | None = None
        self._left: tuple[float, dict[str, Any]] | None = None
        self._exchanged = time.monotonic()
        self._threads: list[threading.Thread] = []
        self._signals: tuple[socket.socket, socket.socket] | None = None

    def start(self) -> None:
        """Begins to speak and to listen; returns when all others do. Raises DistError if the board is gone by then."""
        board, place = self.board, self.place
        board.put(f"beat/{place.rank}", self._beat())
        if place.rank == 0:
            board.put("verdict", None)
            board.put("left", None)
        board.add("speaking")
        until = time.monotonic() + LOST
        while board.count("speaking") < place.world and time.monotonic() < until:
            time.sleep(0.02)
        self._listen_to_signals()
        for target in (self._speak, self._mind):
            thread = threading.Thread(target=target, name=f"llama_ft peers {target.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def watch(self, trainer: Any) -> None:
        """Follows a trainer: from its first step on, standing still is timed."""
        self.trainer = trainer
        stream = trainer.order is None
        trainer.add_callback(Follow(self.headway, self.stall, waits_for_first=stream))

    def settle(self) -> None:
        """Called by the main thread when something speaks for a lost process: returns only if all others are alive, or
        were told to stop as this one was."""
        self.evidence = began = time.monotonic()
        while time.monotonic() < began + SOON + 2 * HEARD and not self.ended:
            if self._left is None and self._calm is not None and self._calm > began + 5 * BEAT:
                break  # rank 0 wrote this two beats or more after it had reason to miss one
            if self._left is not None and self._left[1]["status"] == STOPPED:
                break
            time.sleep(0.1)
        self._stay_if_ended()

    def leave(self, status: int, why: str = "") -> None:
        """The end of this process's part, in order: stops the watch. The others learn why, if it is a failure."""
        self._leaving = status
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=2 * BEAT)
        self._stay_if_ended()
        if status:  # the rest of this process may wait for the others without end
            watchdog = threading.Timer(4 * HEARD, os._exit, (status,))
            watchdog.daemon = True
            watchdog.start()
        if not any(thread.is_alive() for thread in self._threads):
            with suppress(DistError):
                self._say_goodbye(status, why)
        if self._signals is not None:
            signal.set_wakeup_fd(-1)
            for end in self._signals:
                end.close()

    def _say_goodbye(self, status: int, why: str) -> None:
        board, place = self.board, self.place
        self._number += 1
        board.put(f"beat/{place.rank}", self._beat() | {"left": status})
        gone = board.add("gone")
        if status:
            board.put_instead("left", None, {"rank": place.rank, "status": status, "why": why})
            until = time.monotonic() + HEARD
            while gone + board.count("heard") < place.world and time.monotonic() < until:
                time.sleep(0.05)
                gone = board.count("gone")
        elif place.rank == 0 and not place.agent:  # the board ends with this process
            until = time.monotonic() + LOST
            while board.count("gone") < place.world and time.monotonic() < until:
                time.sleep(0.05)

    def _speak(self) -> None:
        """The thread that holds the board."""
        heard = False
        while not self._over.wait(BEAT):
            try:
                verdict = self._round()
                if self._left is not None and not heard:
                    self.board.add("heard")
                    heard = True
                if verdict is not None:
                    verdict = Verdict(**self.board.put_instead("verdict", None, vars(verdict)))
            except DistError:
                self._end(self._board_lost(), board=False)
                return
            if verdict is not None:
                self._end(verdict)
                return

    def _round(self) -> Verdict | None:
        """Says how far this process is and hears the others. Returns what follows from it."""
        board, place = self.board, self.place
        self._number += 1
        board.put(f"beat/{place.rank}", self._beat())
        ranks = range(place.world) if place.rank == 0 else (0,)
        *beats, verdict, left = board.get(*(f"beat/{rank}" for rank in ranks), "verdict", "left")
        before, now = self._exchanged, time.monotonic()
        self._exchanged = now
        for rank, beat in zip(ranks, beats, strict=True):
            seen = self._seen.setdefault(rank, Seen(beat, now, now))
            if now - before > SOON:  # it was this process that was frozen: the others' silence says nothing
                seen.said = seen.moved = now
            seen.hear(beat, now)
            if rank and beat.get("evidence") and self.evidence is None:
                self.evidence = now
        if self._caught_sigterm() and self.evidence is None:
            self.evidence = now
        if verdict is not None:
            return Verdict(**verdict)
        first = self._seen[0]
        if first.beat.get("oldest", 0.0) < 3 * BEAT:
            self._calm = first.said
        if left is not None:
            return self._after(left, now)
        return judge(self._seen, now, evidence=self._suspicious(now), company=self.company, run=self.run)

    def _beat(self) -> dict[str, Any]:
        now = time.monotonic()
        beat: dict[str, Any] = {"number": self._number, "evidence": self._suspicious(now), "at": whereabouts()}
        beat |= self.headway.note()
        if self.place.rank == 0:
            beat["oldest"] = max((now - one.said for one in self._seen.values() if not one.left), default=0.0)
        return beat

    def _suspicious(self, now: float) -> bool:
        """Whether something has spoken for a lost process lately; what turned out harmless is forgotten."""
        return self.evidence is not None and now - self.evidence < 2 * SOON

    def _after(self, left: dict[str, Any], now: float) -> Verdict | None:
        """A process ended early; this one should end by itself, unless it waits for that one."""
        if self._left is None:
            self._left = (now, left)
        if left["status"] == STOPPED and self.stop.asked is not None:
            return None  # all were asked, and this one still writes its checkpoint
        if now - self._left[0] < (WRITTEN if self.headway.paused else GRACE):
            return None
        why = f": {left['why']}" if left["why"] else ""
        told = f"{self.company.name(left['rank'])} ended with exit status {left['status']}{why}"
        return Verdict.of([told], self.run, status=left["status"])

    def _board_lost(self) -> Verdict:
        place, company = self.place, self.company
        what = "the launcher of rank 0" if place.agent else "rank 0"
        silent = time.monotonic() - self._exchanged
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() - silent))
        told = (
            f"{what} on {company.hosts[0]} was lost: {place.address}:{place.port} does not answer since {clock}, for "
            f"{silent:.0f} s; ended, frozen or cut off while {self.company.name(place.rank)} was {self.headway.doing}"
        )
        return Verdict.of([told], self.run)

    def _mind(self) -> None:
        """The thread that watches the speaking one and never touches the board."""
        last = time.monotonic()
        while not self._over.wait(BEAT):
            now = time.monotonic()
            if now - last > SOON:  # this process was frozen
                self._exchanged = now
            last = now
            if now - self._exchanged > (SOON if self._suspicious(now) else LOST):
                self._end(self._board_lost(), board=False)
                return

    def _end(self, verdict: Verdict, *, board: bool = True) -> None:
        """Tells, once per machine, and ends this process."""
        with self._first:
            if self.ended or self._leaving is not None:
                return
            self.ended = True
        place = self.place
        if verdict.standstill is not None:
            head = f"{self.company.name(place.rank)}, {self.headway.doing}"
            file = self.run.path / "faults" / f"hang-step-{verdict.standstill}" / f"rank-{place.rank}.txt"
            write_stacks(file, head, self.trainer)
        here, everywhere, claim = False, True, None
        try:
            if board:
                here, everywhere = self.board.add(f"told/{place.machine}") == 1, self.board.add("told") == 1
        except DistError:
            board = False
        if not board:
            here, claim = self._first_here()
        if here:
            sys.stdout.flush()
            os.write(2, f"\n{verdict.block()}\n".encode())
            if everywhere:
                self._write_status(verdict)
        report_status(verdict.status)
        self._end_frozen(verdict.lost)
        with suppress(DistError):
            if board:
                self._wait_for_the_others(len(verdict.lost))
        if claim is not None:
            time.sleep(HEARD)  # the claim ends with this process, and others may conclude the same a little later
        os._exit(verdict.status)

    def _end_frozen(self, lost: list[int]) -> None:
        """A lost process of this machine may be stopped or hang in C: their launcher would ask it to end, and wait."""
        for rank in lost:
            if self.company.hosts[rank] != self.place.host:
                continue
            with suppress(psutil.Error):
                process = psutil.Process(self.company.pids[rank])
                # The same launcher started both, so that it is not another host's number, nor one given out again.
                if process.ppid() == os.getppid() and process.create_time() < self._started:
                    process.kill()

    def _first_here(self) -> tuple[bool, socket.socket | None]:
        """Whether this process is the first of its machine to tell, without the board: the first to take a name of the
        system's. The name goes with the socket that is returned."""
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0llama_ft {self.place.address} {self.place.port} {self.company.pids[0]}")
        except OSError as error:
            return error.errno != errno.EADDRINUSE and self.place.local_rank == 0, None
        return True, claim

    def _wait_for_the_others(self, lost: int) -> None:
        """Until all that live have heard the verdict: the board may end with this process, or with its launcher."""
        self.board.add("ending")
        until = time.monotonic() + HEARD
        while time.monotonic() < until:
            if self.board.count("ending") + self.board.count("gone") + lost >= self.place.world:
                return
            time.sleep(0.1)

    def _write_status(self, verdict: Verdict) -> None:
        file = self.run.path / STATUS
        with suppress(OSError, ValueError):
            contents = json.loads(file.read_text(encoding="utf-8"))
            ended = datetime.now(UTC).isoformat(timespec="seconds")
            message = "; ".join(one["what"] for one in verdict.problems)
            write_json(file, contents | {"state": "failed", "ended": ended, "message": message})

    def _stay_if_ended(self) -> None:
        """The main thread's last place once another thread ends the process."""
        with self._first:
            ended = self.ended
        if ended:
            time.sleep(4 * HEARD)
            os._exit(1)

    def _listen_to_signals(self) -> None:
        """Signals reach a byte here even while the main thread waits in C, where no handler of Python's runs."""
        if threading.current_thread() is threading.main_thread():
            self._signals = socket.socketpair()
            for end in self._signals:
                end.setblocking(False)
            signal.set_wakeup_fd(self._signals[1].fileno(), warn_on_full_buffer=False)

    def _caught_sigterm(self) -> bool:
        with suppress(OSError):
            return self._signals is not None and signal.SIGTERM in self._signals[0].recv(4096)
        return False
