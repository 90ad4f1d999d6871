"""`llama-ft launch`: fill a scheduler's file, then show it, or write and submit it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.files import write_text
from llama_ft.launch.fill import SCHEDULERS, Scheduler, fill, scheduler_of
from llama_ft.launch.job import make_job

USUAL = "llama-ft"
"""The volume, the claim and the image of a job that names none."""


def launch_recipe(
    path: str,
    overrides: list[str],
    *,
    on: str,
    nodes: int | None = None,
    gpus: int | None = None,
    hardware: str | None = None,
    storage: str | None = None,
    image: str | None = None,
    out: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Writes the file of one scheduler and submits it; returns the exit status of the scheduler's command.

    nodes: None for the launch config's machines; storage and image: None for `llama-ft`. `dry_run` prints the file
    alone on stdout, or writes it to `out`, and submits nothing. Sentences for the user go to stderr. Raises UserError
    for a recipe, plan or scheduler that does not allow it, for a missing command, and for a file that is there with
    other contents.
    """
    scheduler = scheduler_of(on)
    named = {option: value for option, value in (("--storage", storage), ("--image", image)) if value is not None}
    check_options(on, named)
    if not dry_run:
        check_command(scheduler)
    job = make_job(path, overrides, nodes=nodes, gpus=gpus, hardware=hardware)
    words = ["llama-ft", "launch", path, *overrides, "--on", on, "--nodes", str(job.nodes)]
    words += ["--gpus", str(gpus)] if gpus is not None else []
    words += ["--hardware", hardware] if hardware is not None else []
    words += [word for option, value in named.items() for word in (option, value)]
    # The folder of this Python, not of what it is a link to: that one has no accelerate.
    bin_folder = str(Path(sys.executable).parent)
    filled = fill(
        job, on, command=shlex.join(words), bin_folder=bin_folder, storage=storage or USUAL, image=image or USUAL
    )
    for note in filled.notes:
        print(note, file=sys.stderr)
    if dry_run and out is None:
        print(filled.text, end="")
        return 0
    target = out or Path(f"{job.name}{scheduler.suffix}")
    write_new(target, filled.text)
    print(f"written: {target}", file=sys.stderr, flush=True)
    return 0 if dry_run else submit(scheduler, target)


def check_options(on: str, named: Iterable[str]) -> None:
    """UserError for an option that the scheduler's file has no place for."""
    for option in named:
        if option not in SCHEDULERS[on].takes:
            takers = " and ".join(name for name, one in SCHEDULERS.items() if option in one.takes)
            raise UserError(f"a job of {on} takes none", key=option, hint=f"leave it out; it is for {takers}")


def check_command(scheduler: Scheduler) -> None:
    """UserError where the scheduler's command is not there."""
    name = scheduler.submit[0]
    if shutil.which(name) is None:
        hint = f"{scheduler.install}; or --dry-run, which prints the file"
        raise UserError(f"the command {name} is not here", key="--on", hint=hint)


def write_new(target: Path, text: str) -> None:
    """Writes a file, never over one with other contents: someone may have filled in a partition."""
    if target.is_dir():
        raise UserError("is a folder", where=str(target), key="--out", hint=f"name a file in it: --out {target}/NAME")
    if target.exists() and target.read_text(encoding="utf-8") != text:
        hint = "submit that one as it is, remove it, or name another with --out"
        raise UserError("is there already, with other contents", where=str(target), hint=hint)
    write_text(target, text)


def submit(scheduler: Scheduler, file: Path) -> int:
    """Hands the file to the scheduler's own command, whose words and status are the user's."""
    command = [*scheduler.submit, str(file)]
    print(shlex.join(command), file=sys.stderr, flush=True)
    return subprocess.run(command, check=False).returncode
