"""Writing so that a reader sees the old file, the new one, or none: never half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def publish(written: Path, final: Path) -> None:
    """Gives a finished folder its real name, after its bytes are on the disk; what stood there is replaced.

    The old one steps aside by a rename and goes last: if anything fails it stands where it stood.
    """
    for file in [*written.rglob("*"), written]:
        flush_to_disk(file)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    try:
        written.rename(final)
    except OSError:
        if old.exists():
            old.rename(final)
        raise
    flush_to_disk(final.parent)  # until the folder that names it is on the disk, a power cut takes the new name back
    shutil.rmtree(old, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Waits until the bytes of a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file aside and renames it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """The same for JSON, indented, non-ASCII as it is."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def keep_lines(path: Path, kept: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves those lines of a file of JSON objects that `kept` says; a cut last line, of a killed run, goes."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if kept(record):
            lines.append(line)
    write_text(path, "".join(f"{line}\n" for line in lines))
