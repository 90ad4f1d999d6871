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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from llama_ft.errors import Problem, UserError
from llama_ft.plan.launch_line import USUAL_PORT, accelerate_line, meeting_options, shown_line, torchrun_line
from llama_ft.recipe import resolve
from llama_ft.recipe.launchers import Launcher
from llama_ft.recipe.schema import Recipe
from llama_ft.train.ports import port_in_use, port_taken

STATUS_FILE = "LLAMA_FT_STATUS_FILE"
"""Where the trainer leaves its own exit status for `launch`, past a launcher that has only one."""
ASKED = "LLAMA_FT_ASKED"
"""What the launch config asks for, as JSON, for the trainer to check against what it became."""


@dataclass(frozen=True)
class Machines:
    """What is said of the machines beside a launch config, and differs between them; None leaves what it says."""

    rank: int | None = None
    address: str | None = None
    port: int | None = None
    machines: int | None = None
    processes: int | None = None

    def over(self, launcher: Launcher) -> Launcher:
        """A launch config with this laid over it. UserError for a rank, an address or a count that cannot be."""
        said: dict[str, Any] = {
            "machine_rank": self.rank,
            "address": self.address,
            "port": self.port,
            "machines": self.machines,
            "processes": self.processes,
        }
        whole = replace(launcher, **{name: value for name, value in said.items() if value is not None})
        problems = []
        if whole.machines == 1:
            hint = "--num-machines or NUM_MACHINES: how many machines train; leave the rest out for one"
            if whole.machine_rank:
                what = f"this is machine {whole.machine_rank}, and the launch config is for one machine"
                problems.append(Problem(what, None, "machine_rank", hint))
            if self.address is not None:
                what = f"one machine meets nobody at {self.address}, and the launch config is for one"
                problems.append(Problem(what, None, "main_process_ip", hint))
            if problems:  # each machine would train alone, all of them into one folder
                raise UserError(problems)
            return whole
        if whole.address is None:
            hint = "--main-process-ip or MAIN_PROCESS_IP: an address of the machine of rank 0 that all others reach"
            problems.append(Problem("nothing says where the machines meet", None, "main_process_ip", hint))
        if not 0 <= whole.machine_rank < whole.machines:
            hint = f"0 to {whole.machines - 1}, another one on each machine: --machine-rank or MACHINE_RANK"
            problems.append(Problem(f"there is no machine {whole.machine_rank}", None, "machine_rank", hint))
        if whole.processes % whole.machines:
            hint = "num_processes counts the processes of all machines, of which each has as many"
            what = f"{whole.processes} processes cannot be shared by {whole.machines} machines"
            problems.append(Problem(what, None, "num_processes", hint))
        if problems:
            raise UserError(problems)
        return whole

    @property
    def options(self) -> dict[str, int | str]:
        """As options of `accelerate launch`."""
        said: dict[str, Any] = {
            "machine_rank": self.rank,
            "main_process_ip": self.address,
            "main_process_port": self.port,
            "num_machines": self.machines,
        }
        return {name: value for name, value in said.items() if value is not None}


def launch_command(
    recipe_path: str, overrides: list[str], flags: list[str], machines: Machines = Machines()
) -> list[str]:
    """The exact `accelerate launch` line for a recipe, as a list of arguments; torchrun's for what it cannot start."""
    resolved = resolve(recipe_path, overrides)
    assert resolved.launcher is not None  # of a recipe whose names were looked up
    launcher = machines.over(resolved.launcher)
    if launcher.torchrun:
        return torchrun_line(recipe_path, overrides, flags, launcher=launcher)
    return accelerate_line(
        recipe_path,
        overrides,
        flags,
        config=resolved.recipe.launch,
        use_cpu=launcher.use_cpu,
        processes=machines.processes,
        machines={**machines.options, **meeting_options(launcher)},
    )


def launch(recipe_path: str, overrides: list[str], flags: list[str], machines: Machines = Machines()) -> int:
    """Runs it and returns its exit status. The recipe is validated first, so that mistakes cost no start-up."""
    command = launch_command(recipe_path, overrides, flags, machines)
    resolved = resolve(recipe_path, overrides)
    assert resolved.launcher is not None
    launcher = machines.over(resolved.launcher)
    if launcher.torchrun:
        print(
            "accelerate starts one process for distributed_type MULTI_CPU: torchrun starts "
            f"{launcher.processes} instead",
            file=sys.stderr,
        )
    print(shlex.join(shown_line(command)), file=sys.stderr, flush=True)
    if launcher.processes > 1:
        command = [sys.executable, "-m", "llama_ft.train.agents", *meeting(launcher, resolved.recipe), *command[2:]]
    # Ctrl-C reaches the whole process group. The trainer answers it with a checkpoint; everybody above waits for that.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder, "status")
        said = {"PYTHONUNBUFFERED": "1", STATUS_FILE: str(status_file), ASKED: what_is_asked(launcher)}
        try:
            process = subprocess.Popen(command, env=os.environ | said)
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


def meeting(launcher: Launcher, recipe: Recipe) -> list[str]:
    """The arguments with which the launchers of several machines meet before they start anything; none for one machine.

    MachineFault where the port is taken on the machine of rank 0.
    """
    if launcher.machines == 1:
        return []
    port = launcher.port or USUAL_PORT
    if launcher.machine_rank == 0 and port_in_use(port):
        raise port_taken(port)
    where = [f"--meet={launcher.address}:{port}", f"--machine={launcher.machine_rank}", f"--of={launcher.machines}"]
    return [*where, f"--within={recipe.training.join_timeout:g}"]


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
