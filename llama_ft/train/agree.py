"""What one process finds out and all must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list

from llama_ft.errors import MachineFault, UserError

T = TypeVar("T")


def said_by_main(ask: Callable[[], T], *, main: bool) -> T:
    """What `ask` answers in the main process, in every process; called by all at the same place.

    An error that it raises is raised in the main process, which tells it once; the others leave with its exit status.
    """
    found: list[Any] = [None]
    if main:
        try:
            found = [ask()]
        except (UserError, MachineFault) as error:
            found = [error]
    answer = broadcast_object_list(found)[0]
    if isinstance(answer, (UserError, MachineFault)):
        if main:
            raise answer
        raise SystemExit(answer.exit_code)
    return answer
