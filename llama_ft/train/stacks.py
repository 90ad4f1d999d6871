"""What every process of a run that stands still was doing, for whoever looks for the reason."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from llama_ft.files import write_text
from llama_ft.paths import PACKAGE


def main_frame() -> FrameType | None:
    """Where the main thread is now."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def whereabouts() -> str | None:
    """`llama_ft/data/batches.py:48, __call__`: the innermost place of this project's code in the main thread, and
    what it called from there."""
    frame = main_frame()
    if frame is None:
        return None
    innermost = _place(frame)
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(str(PACKAGE)):
        ours = ours.f_back
    if ours is None or ours is frame:
        return f"at {innermost}"
    return f"at {_place(ours)}, in {innermost}"


def _place(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    near = file.relative_to(PACKAGE.parent) if file.is_relative_to(PACKAGE.parent) else Path(*file.parts[-2:])
    return f"{near}:{frame.f_lineno}, {frame.f_code.co_name}"


def write_stacks(file: Path, head: str, trainer: Any) -> None:
    """The stack of every thread, the main one first, and the documents of the micro-batches that the trainer took
    last. Nothing is raised: this is written by a process that is about to end."""
    try:
        parts = [head, *documents_held(trainer), *stacks()]
        write_text(file, "\n".join(parts) + "\n")
    except Exception as error:
        print(f"{file} could not be written: {error}", file=sys.stderr)


def stacks() -> list[str]:
    """One text per thread."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda one: one[0] != main)
    return [
        f"\nthread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in frames
    ]


def documents_held(trainer: Any) -> list[str]:
    """The documents of the last micro-batches by source and row, one line each."""
    guard = getattr(trainer, "guard", None)
    if guard is None or not guard.batches:
        return ["documents: none yet"]
    lines = [f"documents of the last step that was read, of {len(guard.batches)} micro-batches:"]
    for number, (batch, origins) in enumerate(guard.batches):
        if not origins:
            lines.append(f"  micro-batch {number}: {batch['input_ids'].numel()} tokens, of rows that are not known")
        for source, row, part in origins:
            where = guard.prepared.job.train[source].where(row)
            lines.append(f"  micro-batch {number}: {where}" + (f", part {part}" if part else ""))
    return lines
