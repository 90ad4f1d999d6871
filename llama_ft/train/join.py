"""The processes of a run meet before anything is loaded: all are there, all run the same, all see the same folder.

Each leaves a note of who it is and what it runs; rank 0 waits for all of them, the others for rank 0. Whoever is
missing after `training.join_timeout` seconds is named on every machine that did come. Without this, a process that
never comes shows as a timeout deep in torch, and another version on one machine as a curve that is slightly off.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.checks import how_to_go_on
from llama_ft.train.engine import asked_engine
from llama_ft.train.lock import commit, used_besides, versions
from llama_ft.train.resume import differing
from llama_ft.train.store import Board, DistError, Place

COMPARED = 60.0
"""Seconds in which every process answers whether it runs the same as rank 0."""
HEARD = 5.0
"""Seconds that a process which ends gives the others to hear why."""
LOOKED = 10.0
"""Seconds in which a file that one machine has written appears on another one: NFS keeps what it knows of a folder."""


@dataclass(frozen=True)
class Company:
    """The processes that have met: this one's place, their board, and by rank their hosts, process ids and machines."""

    place: Place
    board: Board
    hosts: Sequence[str]
    pids: Sequence[int]
    machines: Sequence[str]

    def name(self, rank: int) -> str:
        """`rank 1 on b (process 4711)`"""
        return f"rank {rank} on {self.hosts[rank]} (process {self.pids[rank]})"


def join(recipe: Recipe, run: Run, place: Place) -> Company:
    """Waits for all processes of the run and compares what they run.

    Raises MachineFault that names who did not come within `training.join_timeout` seconds, or that the port is taken;
    UserError that names rank, host and what differs: packages, recipe, run folder. One process of a machine raises it,
    the others SystemExit with its status.
    """
    seconds = recipe.training.join_timeout
    until = time.monotonic() + seconds
    try:
        board = Board(place, seconds)
    except DistError:
        raise _once(None, place, _nobody(place, run, seconds)) from None
    try:
        with _store_stays(place, run):
            return _meet(recipe, run, place, board, until)
    except UserError as error:
        raise _once(board, place, error) from None


def _meet(recipe: Recipe, run: Run, place: Place, board: Board, until: float) -> Company:
    board.put(f"came/{place.rank}", _note(recipe, place))
    board.add("came")
    everyone = range(place.world)
    if place.rank == 0:
        _wait(lambda: board.count("came") >= place.world, until)
        missing = [rank for rank in everyone if not board.has(f"came/{rank}")]
        board.put("met", {"missing": missing})
    elif _wait(lambda: board.has("met"), until + 10):
        missing = board.get("met")[0]["missing"]
    else:
        missing = [rank for rank in everyone if not board.has(f"came/{rank}")] or [0]
    if missing:
        present = {rank: board.get(f"came/{rank}")[0] for rank in everyone if board.has(f"came/{rank}")}
        raise _missing(missing, present, place, run, recipe.training.join_timeout)
    notes = board.get(*(f"came/{rank}" for rank in everyone))
    _compare(recipe, run, place, board, notes)
    hosts, pids = [note["host"] for note in notes], [note["pid"] for note in notes]
    # torch and accelerate take an unsaid number of this machine's processes for one.
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(hosts.count(place.host)))
    return Company(place, board, hosts, pids, [note["machine"] for note in notes])


def _note(recipe: Recipe, place: Place) -> dict[str, Any]:
    asked = asked_engine()
    found = versions(used_besides(recipe, asked.name if asked else "")) | {"commit of llama_ft": commit() or "none"}
    return {"host": place.host, "machine": place.machine, "pid": os.getpid(), "versions": found}


def _compare(recipe: Recipe, run: Run, place: Place, board: Board, notes: Sequence[dict[str, Any]]) -> None:
    """Every process holds itself against rank 0, and rank 0 gathers what they found. UserError with all of it."""
    if place.rank == 0:
        with _token(run) as token:
            board.put("first", {"recipe": recipe.model_dump(mode="json"), "token": token})
            done = _wait(lambda: board.count("compared") >= place.world - 1, time.monotonic() + COMPARED)
        if not done:
            late = [rank for rank in range(1, place.world) if not board.has(f"differs/{rank}")]
            board.put("begin", [["did not answer while the processes were compared", ranks_named(late), None]])
        else:
            found = board.get(*(f"differs/{rank}" for rank in range(1, place.world)))
            board.put("begin", [one for problems in found for one in problems])
    else:
        _wait(lambda: board.has("first"), time.monotonic() + COMPARED)
        first = board.get("first")[0]
        board.put(f"differs/{place.rank}", list(_differs(recipe, run, place, first, notes)))
        board.add("compared")
        _wait(lambda: board.has("begin"), time.monotonic() + COMPARED + 10)
    problems = [Problem(what, where, key) for what, where, key in board.get("begin")[0]]
    if problems:
        hint = "every process of a run must run the same; make them equal and start again"
        raise UserError([*problems[:-1], replace(problems[-1], hint=hint)])


def _differs(
    recipe: Recipe, run: Run, place: Place, first: dict[str, Any], notes: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, str, str | None]]:
    """What this process has another of than rank 0, as (what, where, key)."""
    where, other = f"rank {place.rank} on {place.host}", f"rank 0 on {notes[0]['host']}"
    mine, theirs = notes[place.rank]["versions"], notes[0]["versions"]
    for package in dict.fromkeys([*theirs, *mine]):
        here, there = mine.get(package, "absent"), theirs.get(package, "absent")
        if here != there:
            yield f"{package} is {here}, and {there} on {other}", where, None
    for one in differing(Recipe.model_validate(first["recipe"]), recipe):
        yield f"is {one.new!r}, and {one.old!r} on {other}", where, one.key
    if first["token"] is not None:
        token = run.path.parent / f".{run.path.name}.{first['token']}"
        if not _wait(token.exists, time.monotonic() + LOOKED):
            what = f"{run.path} is not the folder that {other} writes to: machines must share it"
            yield what, where, "output_dir"


@contextmanager
def _token(run: Run) -> Iterator[str | None]:
    """A file beside the run folder that every process must see while it is there; None where it cannot be written."""
    token = uuid.uuid4().hex[:12]
    file = run.path.parent / f".{run.path.name}.{token}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError:  # said later, with its reason
        yield None
        return
    try:
        yield token
    finally:
        Path(file).unlink(missing_ok=True)


def _missing(
    missing: Sequence[int], present: dict[int, dict[str, Any]], place: Place, run: Run, seconds: float
) -> MachineFault:
    """Who did not come, each with the host where others of its machine say it."""
    local = place.local_world
    hosts = {rank // local: note["host"] for rank, note in present.items()} if local else {}
    machines: dict[Any, list[int]] = {}
    for rank in missing:
        machines.setdefault(rank // local if local else None, []).append(rank)
    problems = []
    for machine, ranks in machines.items():
        on = f" on {hosts[machine]}" if machine in hosts else f" (machine {machine})" if machine is not None else ""
        problems.append(Problem(f"{ranks_named(ranks)}{on} did not come within {seconds:g} s"))
    came = ", ".join(
        f"{ranks_named([rank for rank, note in present.items() if note['host'] == host])} on {host}"
        for host in dict.fromkeys(note["host"] for note in present.values())
    )
    hint = (
        f"start the same command on every machine, each of which must reach {place.address}:{place.port}; "
        f"training.join_timeout says how long to wait; {how_to_go_on(run)}"
    )
    return MachineFault([*problems, Problem(f"these came: {came}", None, None, hint)])


def _nobody(place: Place, run: Run, seconds: float) -> MachineFault:
    """Nothing answers where rank 0 should be."""
    return MachineFault(
        f"rank 0 did not come within {seconds:g} s: nothing answers at {place.address}:{place.port}",
        where=f"rank {place.rank} on {place.host}",
        hint=f"start rank 0, or mend the way to it (address, port, firewall); {how_to_go_on(run)}",
    )


def _once(board: Board | None, place: Place, error: UserError) -> BaseException:
    """The error for one process of each machine, and its exit status for the others."""
    first = place.local_rank == 0
    with suppress(DistError):
        if board is not None:
            first = board.add(f"told/{place.machine}") == 1
            board.add("told")
            # The board ends with this process, or with its launcher: all that came are to know by then.
            _wait(lambda: board.count("told") >= board.count("came"), time.monotonic() + HEARD)
    return error if first else SystemExit(error.exit_code)


@contextmanager
def _store_stays(place: Place, run: Run) -> Iterator[None]:
    try:
        yield
    except DistError as error:
        raise MachineFault(
            f"the machine of rank 0 ({place.address}:{place.port}) was lost while the processes met",
            where=f"rank {place.rank} on {place.host}",
            hint=how_to_go_on(run),
        ) from error


def _wait(there: Callable[[], bool], until: float) -> bool:
    """Asks until the answer is yes or the time is up; returns the answer."""
    pause = 0.02
    while not there():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(0.5, pause * 1.5)
    return True


def ranks_named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 4-7`"""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    said = ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {said}"
