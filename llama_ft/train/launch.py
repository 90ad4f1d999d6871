"""`llama-ft train`: opens the main door, `accelerate launch … -m llama_ft.train RECIPE`, with the recipe's config."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from llama_ft.plan.launch_line import accelerate_line, shown_line
from llama_ft.recipe import resolve
from llama_ft.recipe.launchers import Launcher
from llama_ft.recipe.trainable import check_trainable

STATUS_FILE = "LLAMA_FT_STATUS_FILE"
"""Where the trainer leaves its own exit status for `launch`, past a launcher that has only one."""
ASKED = "LLAMA_FT_ASKED"
"""What the launch config asks for, as JSON, for the trainer to check against what it became."""


def launch_command(recipe_path: str, overrides: list[str], flags: list[str]) -> list[str]:
    """The exact `accelerate launch` line for a recipe, as a list of arguments."""
    resolved = resolve(recipe_path, overrides)
    check_trainable(resolved.recipe, resolved.origins)
    use_cpu = resolved.launcher is not None and resolved.launcher.use_cpu
    return accelerate_line(recipe_path, overrides, flags, config=resolved.recipe.launch, use_cpu=use_cpu)


def launch(recipe_path: str, overrides: list[str], flags: list[str]) -> int:
    """Runs it and returns its exit status. The recipe is validated first, so that mistakes cost no start-up."""
    command = launch_command(recipe_path, overrides, flags)
    asked = what_is_asked(resolve(recipe_path, overrides).launcher)
    print(shlex.join(shown_line(command)), file=sys.stderr, flush=True)
    # Ctrl-C reaches the whole process group. The trainer answers it with a checkpoint; everybody above waits for that.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder, "status")
        environment = os.environ | {"PYTHONUNBUFFERED": "1", STATUS_FILE: str(status_file), ASKED: asked}
        try:
            process = subprocess.Popen(command, env=environment)
            forward = signal.signal(signal.SIGTERM, lambda number, _: tell_trainers(process, number))
            try:
                status = process.wait()
            finally:
                signal.signal(signal.SIGTERM, forward)
        finally:
            signal.signal(signal.SIGINT, previous)
        if status and status_file.exists():
            return int(status_file.read_text())
    return status if status >= 0 else 128 - status


def what_is_asked(launcher: Launcher | None) -> str:
    """The value of ASKED for a launch config: its engine, its processes, and whether it is for a CPU."""
    assert launcher is not None  # of a recipe whose names were looked up
    asked = {"engine": launcher.engine, "processes": launcher.processes, "use_cpu": launcher.use_cpu}
    return json.dumps(asked)


def tell_trainers(launcher: subprocess.Popen, number: int) -> None:
    """Passes a signal to the processes that train. The launcher itself would die of it and leave them running."""
    trainers: list[Any] = psutil.Process(launcher.pid).children()
    for process in trainers or [launcher]:
        process.send_signal(number)


def report_status(code: int) -> None:
    """Called by the trainer before it ends with an error: launchers turn every failure into exit 1.

    Of several processes the first to end says why; the launcher then stops the others.
    """
    if STATUS_FILE in os.environ:
        with suppress(FileExistsError), Path(os.environ[STATUS_FILE]).open("x", encoding="utf-8") as file:
            file.write(str(code))
