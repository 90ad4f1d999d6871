"""What the processes of a run conclude about one another from what each last said, and how it is told."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.recipe.run import Run
from llama_ft.train.checks import how_to_go_on
from llama_ft.train.headway import ENDED
from llama_ft.train.join import Company, ranks_named

LOST = 30.0
"""Seconds without a sign of life after which a process is taken for lost. Long enough for one that a slow disk or a
call that holds the interpreter keeps from speaking."""
SOON = 8.0
"""The same where something else speaks for it: an exchange failed, or the launcher ends this process."""
GRACE = 5.0
"""Seconds in which the others of a process that ended early end by themselves, as where all meet the same mistake."""

WRITTEN = 300.0
"""The same for one that is writing a checkpoint."""


@dataclass
class Seen:
    """What one process last said, and when, on the clock of the one that listens: `said` moves with each beat, `moved`
    with each sign of progress."""

    beat: dict[str, Any]
    said: float
    moved: float
    when: float = field(default_factory=time.time)

    def hear(self, beat: dict[str, Any], now: float) -> None:
        """Takes in what it says now."""
        if beat["number"] != self.beat["number"]:
            self.said, self.when = now, time.time()
        if beat["count"] != self.beat["count"] or not beat["limit"]:
            self.moved = now
        self.beat = beat

    @property
    def left(self) -> bool:
        """Whether it has ended in order, for whatever reason."""
        return self.beat.get("left") is not None


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, as every process hears it: `problems` as in a block, `status` to exit with, the ranks that are
    lost, and for a standstill the step whose stacks are written."""

    problems: list[dict[str, Any]]
    status: int = 1
    lost: list[int] = field(default_factory=list)
    standstill: int | None = None

    @classmethod
    def of(cls, what: Sequence[str], run: Run, **rest: Any) -> Verdict:
        """From sentences; the last one carries how to go on."""
        hint = how_to_go_on(run)
        problems = [Problem(one, hint=hint if one is what[-1] else None) for one in what]
        return cls([asdict(one) for one in problems], **rest)

    def block(self) -> str:
        """The whole message."""
        kind = UserError if self.status == UserError.exit_code else MachineFault
        return kind(Problem(**one) for one in self.problems).block()


def judge(seen: dict[int, Seen], now: float, *, evidence: bool, company: Company, run: Run) -> Verdict | None:
    """The first of: a process is lost; none gets on. `seen`: of every process that is listened to, by rank."""
    alive = {rank: one for rank, one in seen.items() if not one.left}
    bound = SOON if evidence else LOST
    lost = [rank for rank, one in alive.items() if now - one.said > bound]
    if lost:
        return Verdict.of(list(told_lost(lost, alive, now, company)), run, lost=lost)
    limits = [one.beat["limit"] for one in alive.values()]
    if len(seen) < company.place.world or not limits or not all(limits):
        return None
    still = now - max(one.moved for one in alive.values())
    if still <= min(limits):
        return None
    return standing(alive, still, company, run)


def told_lost(lost: Sequence[int], alive: dict[int, Seen], now: float, company: Company) -> Iterator[str]:
    """A sentence for each machine that has lost processes."""
    for host in dict.fromkeys(company.hosts[rank] for rank in lost):
        ranks = [rank for rank in lost if company.hosts[rank] == host]
        last = max((alive[rank] for rank in ranks), key=lambda one: one.said)
        process = f" (process {company.pids[ranks[0]]})" if len(ranks) == 1 else ""
        clock = time.strftime("%H:%M:%S", time.localtime(last.when))
        yield (
            f"{ranks_named(ranks)} on {host}{process} {'was' if len(ranks) == 1 else 'were'} lost: no sign of life "
            f"since {clock}, for {now - last.said:.0f} s; killed, frozen or cut off while {last.beat['doing']}"
        )


def standing(alive: dict[int, Seen], still: float, company: Company, run: Run) -> Verdict:
    """No process gets on: the one to blame is behind the others, which wait for it."""
    places = {rank: one.beat["place"] for rank, one in alive.items()}
    least, most = min(places.values()), max(places.values())
    clock = time.strftime("%H:%M:%S", time.localtime(time.time() - still))
    step = least[0] + (least[2] >= ENDED)  # the one that is not done
    folder = run.path / "faults" / f"hang-step-{step}"
    kept = f"the stacks of every process and the documents it held: {folder}"
    if least == most:
        first = f"no process has got on since {clock}, for {still:.0f} s, and none is behind: each is"
        return Verdict.of([f"{first} {alive[min(alive)].beat['doing']}", kept], run, standstill=step)
    behind = [rank for rank, place in places.items() if place == least]
    told = []
    for rank in behind[:4]:
        at = alive[rank].beat.get("at")
        told.append(
            f"{company.name(rank)} stands still since {clock}, for {still:.0f} s, {alive[rank].beat['doing']}"
            + (f" ({at})" if at else "")
        )
    others = [rank for rank in places if rank not in behind]
    told.append(f"{ranks_named(others)} {'waits' if len(others) == 1 else 'wait'} for it")
    return Verdict.of([*told, kept], run, standstill=step)
