"""Writing so that a reader sees the old file, the new one, or none: never half of one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


def publish(written: Path, final: Path) -> None:
    """Gives a finished folder its real name, after its bytes are on the disk; what stood there is replaced.

    The old one steps aside by a rename and goes last: if anything fails it stands where it stood.
    """
    for file in [*written.rglob("*"), written]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
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
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file aside and renames it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """The same for JSON, indented, non-ASCII as it is."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
