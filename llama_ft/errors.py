"""What goes wrong, said once and well.

A :class:`UserError` is the user's to mend (exit 2): it carries every :class:`Problem` found, never only the first.
A :class:`MachineFault` is the machine's (exit 1): disk full, worker killed, GPU lost; it says how to go on.
Anything else is a defect of this project and keeps its traceback.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_USER = 2
EXIT_FAULT = 1


@dataclass(frozen=True)
class Problem:
    """One mistake: what is wrong, where it stands, and what to do about it.

    `where` is `file:line:column` for a recipe, `file, row N` (0-based) for data, `override N` for an override, or None.
    `key` is the dotted key in a recipe (`training.learning_rate`), if the mistake belongs to one.
    """

    what: str
    where: str | None = None
    key: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        key = f"{self.key}: " if self.key else ""
        hint = f" — {self.hint}" if self.hint else ""
        return f"{place}{key}{self.what}{hint}"


class UserError(Exception):
    """Mistakes that the user can mend. Printed as one block; exit 2.

    >>> raise UserError("no such template 'alpca'", where="r.yaml:3:11", key="template", hint="did you mean 'alpaca'?")
    """

    exit_code = EXIT_USER
    title = "cannot go on"

    def __init__(
        self,
        what: str | Iterable[Problem],
        *,
        where: str | None = None,
        key: str | None = None,
        hint: str | None = None,
    ):
        self.problems = [Problem(what, where, key, hint)] if isinstance(what, str) else list(what)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self):
        # Exceptions cross process borders (data workers) by pickle, which would call __init__ with the text alone.
        return type(self), (self.problems,)

    def block(self) -> str:
        """The whole message: a head line, then one unwrapped line per problem."""
        count = len(self.problems)
        head = f"llama-ft: {self.title} ({count} {'problem' if count == 1 else 'problems'})"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class MachineFault(UserError):
    """The machine failed, not the user: same block, exit 1. `hint` says how to resume."""

    exit_code = EXIT_FAULT
    title = "stopped by the machine"


def nearest(name: object, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None when nothing is near (difflib ratio below 0.6)."""
    matches = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: object, valid: Iterable[str], *, kind: str = "names") -> str:
    """A hint: the nearest valid name, else all of them (up to twelve)."""
    choices = sorted(valid)
    match = nearest(name, choices)
    if match:
        return f"did you mean '{match}'?"
    listed = ", ".join(choices[:12]) + (" …" if len(choices) > 12 else "")
    return f"valid {kind}: {listed}"


@contextmanager
def user_facing(*, debug: bool = False) -> Iterator[None]:
    """Turns a :class:`UserError` into its block on stderr and its exit code; `debug` lets the traceback through."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        print(error.block(), file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
