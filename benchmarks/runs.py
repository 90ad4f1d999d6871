"""Runs of a benchmark through `llama-ft train`: one that is finished is not repeated, one that was stopped goes on."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_ft.errors import UserError
from llama_ft.files import write_json
from llama_ft.recipe.run import Run
from llama_ft.train.page.gather import STATUS


@dataclass(frozen=True)
class Training:
    """A run in `out`/`name`. `command`: the arguments of `llama-ft`; `stands_on`: the names of runs that it reads."""

    out: Path
    name: str
    command: list[str]
    stands_on: list[str] = field(default_factory=list)

    @property
    def run(self) -> Run:
        """Its folder."""
        return Run(self.out / self.name)

    @property
    def record_file(self) -> Path:
        """Beside the run: `command`, when the runs that it stands on had ended (`on`), the `seconds` that it took."""
        return self.out / f"{self.name}.json"

    @property
    def seconds(self) -> float:
        """What it took, all of its starts together."""
        return float(read(self.record_file)["seconds"])

    def standing(self) -> dict[str, Any]:
        """When the runs that it stands on ended: it must be repeated where they were."""
        return {name: status_of(Run(self.out / name)).get("ended") for name in self.stands_on}

    def is_finished(self) -> bool:
        """Whether it came to its end and has its merged model."""
        return status_of(self.run).get("state") == "finished" and (self.run.merged / "config.json").is_file()

    def next_flag(self, overwrite: bool = False) -> str | None:
        """How `llama-ft train` is to be called: `` for a new run, `--resume` or `--overwrite`; None for not at all.

        UserError for a run that other settings made.
        """
        record = read(self.record_file)
        if not self.run.recipe_file.exists() and not self.run.checkpoints.exists():
            return ""
        if overwrite:
            return "--overwrite"
        if record.get("command") != self.command:
            what = f"{self.run.path} is a run with other settings than these"
            raise UserError(what, hint="begin again with --overwrite, or name another --out")
        if record.get("on") != self.standing():
            return "--overwrite"
        if self.is_finished():
            return None
        return "--resume" if self.run.steps() else "--overwrite"

    def train(self, overwrite: bool = False) -> None:
        """Trains unless it is done already; SystemExit with the command's status where it did not come to its end."""
        flag = self.next_flag(overwrite)
        if flag is None:
            print(f"{self.name}: done before", flush=True)
            return
        before = read(self.record_file).get("seconds", 0.0) if flag == "--resume" else 0.0
        record = {"command": self.command, "on": self.standing(), "seconds": before}
        write_json(self.record_file, record)
        line = [*self.command, *filter(None, [flag])]
        print(f"\n{self.name}: {shlex.join(['llama-ft', *line])}", flush=True)
        began = time.perf_counter()
        status = run_to_its_end([sys.executable, "-m", "llama_ft.cli", *line])
        write_json(self.record_file, record | {"seconds": round(before + time.perf_counter() - began, 1)})
        if status:
            print(f"\n{self.name} ended with status {status}; the same command goes on from here", file=sys.stderr)
            raise SystemExit(status)


def status_of(run: Run) -> dict[str, Any]:
    """A run's status.json; empty where there is none, or none that can be read."""
    return read(run.path / STATUS)


def read(file: Path) -> dict[str, Any]:
    """What a JSON file holds; empty where there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def run_to_its_end(command: list[str]) -> int:
    """Runs a command and returns its status. Ctrl-C and SIGTERM are its own to answer, with a checkpoint."""
    process = subprocess.Popen(command)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it reaches the whole group
    terminate = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
