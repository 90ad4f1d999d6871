"""What a job asks its scheduler for: time, a grace period, memory, cores; from the plan, None where it says nothing."""

from __future__ import annotations

import math

from llama_ft.plan.plan import Plan
from llama_ft.plan.time import DISK

MINUTE, HOUR, DAY = 60, 3600, 86400
MARGIN = 1.5
"""Of the time limit over the estimated time. Our choice: an estimate that is a third too low still fits."""
LEAST_LIMIT = HOUR // 2
"""No limit is shorter: images, mounts and downloads come before the run and no plan knows them."""
LEAST_GRACE = 2 * MINUTE
UNKNOWN_GRACE = 5 * MINUTE
MEMORY_MARGIN = 1.25
"""Of the memory asked for over the plan's, on a CPU."""
CORES_PER_GPU = 4
"""Our choice: a process that drives its GPU, and others that prepare the rows beside it."""
GIB = 2**30


def time_limit(plan: Plan) -> int | None:
    """Seconds, whole minutes: the estimated time with a margin. None where the plan knows no time."""
    if plan.seconds is None:
        return None
    wanted = max(LEAST_LIMIT, MARGIN * plan.seconds.total)
    return math.ceil(wanted / MINUTE) * MINUTE


def grace(plan: Plan) -> int:
    """Seconds between SIGTERM and SIGKILL: the step under way is finished, then a checkpoint is written.

    Twice the estimate of both and a minute, at least two minutes; five where the plan knows no time.
    """
    if plan.seconds is None or not plan.steps.total:
        return UNKNOWN_GRACE
    step, write = plan.seconds.training / plan.steps.total, plan.disk.checkpoint / DISK
    return max(LEAST_GRACE, math.ceil((MINUTE + 2 * step + 2 * write) / MINUTE) * MINUTE)


def memory_gib(plan: Plan, processes: int) -> int | None:
    """Main memory of a node in whole GiB. Known on a CPU alone: of a GPU's host the plan says nothing."""
    if plan.host is None:
        return None
    return math.ceil(MEMORY_MARGIN * plan.peak * processes / GIB)


def slurm_time(seconds: int) -> str:
    """`D-HH:MM:SS`, as sbatch reads it.

    >>> slurm_time(93780)
    '1-02:03:00'
    """
    days, rest = divmod(seconds, DAY)
    return f"{days}-{rest // HOUR:02}:{rest % HOUR // MINUTE:02}:{rest % MINUTE:02}"
