"""Folders of packages that must not go into our own environment: installed by pip on first use, complete or absent."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from llama_ft.errors import MachineFault
from llama_ft.paths import cache_dir

_SHOWN = 400


def tool_folder(
    name: str, requirements: str, *, what: str, package: str, by_hand: str, unfit: Callable[[Path], str | None]
) -> Path:
    """`tools/NAME` in the cache, filled by pip where it is missing; safe when several processes ask at once.

    requirements: pip's own list, in which nothing may be left open: dependencies are not looked for. what: told while
    it is installed. package: the one that it is for. by_hand: arguments of a pip that does the same, `{folder}` in
    them. unfit: why a folder that pip has filled cannot be used, or None.
    Raises MachineFault when pip cannot fetch it, or what came is unfit.
    """
    folder = cache_dir("tools", name)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                for left in folder.parent.glob(f".{folder.name}-*"):  # of one that was killed: the lock is ours
                    shutil.rmtree(left, ignore_errors=True)
                print(f"installing {what} once into {folder}", file=sys.stderr, flush=True)
                _install(folder, requirements, package, by_hand.format(folder=folder), unfit)
    except OSError as error:
        raise MachineFault(f"could not make {folder}: {error}", hint="set LLAMA_FT_CACHE elsewhere") from error
    return folder


def _install(folder: Path, requirements: str, package: str, by_hand: str, unfit: Callable[[Path], str | None]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        pinned, target = Path(aside, "pinned.txt"), Path(aside, "target")
        pinned.write_text(requirements, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", *(["--require-hashes"] if "--hash=" in requirements else [])]
        command += ["--target", str(target), "-r", str(pinned)]
        result = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        reason = unfit(target) if not result.returncode else None
        if result.returncode:
            lines = result.stderr.strip().splitlines()
            lines = [line for line in lines if line.startswith("ERROR")] or lines
            reason = " / ".join(lines)[-_SHOWN:] or "pip gave no reason"
        if reason is not None:
            hint = f"go online once, or: pip install --no-deps {by_hand}"
            raise MachineFault(f"could not install {package}: {reason}", hint=hint)
        shutil.move(target, folder)
