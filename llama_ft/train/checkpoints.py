"""A checkpoint folder: sealed with checksums when it is written, looked through before it is used, removed when old.

`checkpoints/step-N/` is complete or absent. Beside the files of transformers (weights or adapter, optimizer, scheduler,
the random number generators of every process) it holds

    position.json    where the data stands, and what was measured there
    recipe.yaml      the resolved recipe
    run.lock.json    hashes, versions, what `auto` became
    manifest.json    every other file with its size and checksum, written last

The checksum is XXH3 with 128 bits: it finds a flipped bit and a cut file as surely as SHA-256, at the speed of memory.
SHA-256 would also withstand somebody who forges a checkpoint on purpose; whoever can write here can write the manifest.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from llama_ft.files import write_json
from llama_ft.recipe.run import Run

MANIFEST = "manifest.json"
POSITION = "position.json"
ASIDE = ".writing"
CHECKSUM = "xxh3_128"
CHUNK = 16 * 2**20
UNUSED = ("training_args.bin", "README.md")
"""What the libraries write and nothing here reads: a pickle of the arguments, which lie in recipe.yaml, and a card."""


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest held-out loss, in nats per labelled token."""

    step: int
    held_out_loss: float

    def __str__(self) -> str:
        return f"step-{self.step}, held-out {self.held_out_loss:.4f}"


def seal(folder: Path, run: Run, position: Mapping[str, Any]) -> None:
    """Adds what transformers does not write, and last the manifest, to a checkpoint that is not published yet."""
    for name in UNUSED:
        (folder / name).unlink(missing_ok=True)
    for file in (run.recipe_file, run.lock_file):
        if file.exists():  # a trainer that is used alone has neither
            shutil.copyfile(file, folder / file.name)
    write_json(folder / POSITION, dict(position))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, CHECKSUM: checksum(file)} for file in files
    }
    write_json(folder / MANIFEST, {"format": 1, "files": listed})


def checksum(file: Path) -> str:
    """XXH3 with 128 bits of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, one fault per file and in words; empty for a whole one. Reads every byte."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(entry["bytes"]), str(entry[CHECKSUM])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: cannot be read"]
    faults = []
    for name, (size, expected) in files.items():
        try:
            found = (folder / name).stat().st_size
            if found != size:
                faults.append(f"{name}: {found:,} bytes instead of {size:,}")
            elif checksum(folder / name) != expected:
                faults.append(f"{name}: checksum")
        except FileNotFoundError:
            faults.append(f"{name}: missing")
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    return faults


def newest_whole(run: Run) -> tuple[int | None, dict[int, list[str]]]:
    """The newest step whose checkpoint is whole, and the faults of those after it. None if no checkpoint is whole.

    Looks from the newest down and no further than it must: of many large checkpoints usually one is read.
    """
    damaged: dict[int, list[str]] = {}
    for step in reversed(run.steps()):
        faults = verify(run.checkpoint(step))
        if not faults:
            return step, damaged
        damaged[step] = faults
    return None, damaged


def set_aside(run: Run, step: int) -> Path:
    """Renames a damaged checkpoint to `step-N.damaged`: kept, and not taken for a checkpoint. Returns where it lies."""
    kept = run.checkpoint(step).with_name(f"step-{step}.damaged")
    shutil.rmtree(kept, ignore_errors=True)
    return run.checkpoint(step).rename(kept)


def tidy(run: Run) -> None:
    """Removes what a killed run left half-written or half-removed, and brings back what it was about to replace."""
    for old in run.checkpoints.glob(".step-*.old"):
        final = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if not final.exists():
            old.rename(final)
    for left in run.checkpoints.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def position_of(folder: Path) -> dict[str, Any]:
    """A checkpoint's position.json; empty if it cannot be read."""
    try:
        return json.loads((folder / POSITION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def best_checkpoint(run: Run) -> Best | None:
    """The checkpoint with the lowest held-out loss of those written right after an evaluation; the first of equals."""
    found = [(position_of(run.checkpoint(step)).get("held_out_loss"), step) for step in run.steps()]
    measured = [(loss, step) for loss, step in found if isinstance(loss, float) and math.isfinite(loss)]
    return Best(min(measured)[1], min(measured)[0]) if measured else None


def remove_old(run: Run, keep: int | None) -> list[int]:
    """Removes all but the newest `keep` checkpoints and the best one; None keeps all. Returns the steps removed.

    Each leaves its name first, so that none is ever seen with half of its files.
    """
    if keep is None:
        return []
    best = best_checkpoint(run)
    old = [step for step in run.steps()[:-keep] if best is None or step != best.step]
    for step in old:
        leaving = run.checkpoint(step).with_name(f".step-{step}.removing")
        shutil.rmtree(leaving, ignore_errors=True)
        run.checkpoint(step).rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)
    return old
