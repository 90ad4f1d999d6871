"""`llama-ft launch` itself: stdout holds the file alone, a file is never written over, the scheduler's command runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.launch.commands import launch_recipe

LAUNCH = [sys.executable, "-m", "llama_ft.cli", "launch", "tiny.yaml", "--on", "slurm", "--nodes", "2"]


def run(folder, *more: str, path: str = "/nowhere") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAUNCH, *more], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)


@pytest.fixture
def sbatch(here):
    """A stand-in that says what it was given."""
    folder = here / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text('#!/bin/sh\necho "Submitted $*"\nexit 7\n')
    (folder / "sbatch").chmod(0o755)
    return str(folder)


def test_a_dry_run_prints_the_file_alone(here):
    done = run(here, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n# Written by: llama-ft launch tiny.yaml --on slurm --nodes 2\n")
    assert done.stdout.endswith('exit "$status"\n') and "no GPUs" in done.stderr
    assert not (here / "tiny.sbatch").exists()


def test_a_dry_run_into_a_file(here, capfd):
    assert launch_recipe("tiny.yaml", [], on="slurm", nodes=2, dry_run=True, out=Path("jobs/one.sbatch")) == 0
    told = capfd.readouterr()
    assert told.out == "" and "written: jobs/one.sbatch" in told.err
    assert "llama_ft.train tiny.yaml" in (here / "jobs" / "one.sbatch").read_text()


def test_without_the_schedulers_command(here):
    done = run(here)
    assert done.returncode == 2 and done.stdout == ""
    assert "the command sbatch is not here" in done.stderr and "--dry-run" in done.stderr
    assert not (here / "tiny.sbatch").exists()


def test_written_and_submitted(here, sbatch, monkeypatch, capfd):
    monkeypatch.setenv("PATH", f"{sbatch}:/bin:/usr/bin")
    assert launch_recipe("tiny.yaml", [], on="slurm", nodes=2) == 7
    assert capfd.readouterr().out == "Submitted tiny.sbatch\n"
    assert "--num_machines 2" in (here / "tiny.sbatch").read_text()


def test_a_file_that_somebody_changed_stays(here, sbatch, monkeypatch, capfd):
    monkeypatch.setenv("PATH", f"{sbatch}:/bin:/usr/bin")
    (here / "tiny.sbatch").write_text("#!/bin/bash\n#SBATCH --partition=mine\n")
    with pytest.raises(UserError, match="--out"):
        launch_recipe("tiny.yaml", [], on="slurm", nodes=2)
    assert "Submitted" not in capfd.readouterr().out
    assert "partition=mine" in (here / "tiny.sbatch").read_text()
