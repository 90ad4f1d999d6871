"""The sbatch file on a real Slurm of two nodes: preempted twice, queued again, and the same run in the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, missing, two_nodes
from tests.launch.conftest import write_recipe
from tests.train.conftest import metric

WHY = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY is not None, reason=str(WHY))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    with two_nodes(folder) as found:
        yield found


@pytest.fixture
def submit(cluster, tmp_path, tiny_base):
    """Writes and submits a recipe of two nodes by the command; returns the job and where it runs."""

    def submitted(name: str, *overrides: str) -> tuple[str, Path]:
        folder = tmp_path / name
        folder.mkdir()
        write_recipe(folder, tiny_base, max_steps=120)
        words = [sys.executable, "-m", "llama_ft.cli", "launch", "tiny.yaml", *overrides, "--on", "slurm"]
        done = subprocess.run(
            [*words, "--nodes", "2"], cwd=folder, env=cluster.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return re.fullmatch(r"Submitted batch job (\d+)\n", done.stdout)[1], folder

    return submitted


def until_step(cluster: Cluster, job: str, folder: Path, step: int) -> None:
    """Waits until the run has logged a step."""
    file = folder / "runs" / "tiny" / "metrics.jsonl"
    for _ in range(600):
        lines = file.read_text().splitlines() if file.exists() else []
        if any(json.loads(line).get("step", 0) >= step for line in lines):
            return
        assert cluster.state(job) in ("PENDING", "RUNNING", "CONFIGURING"), log(folder, job)
        time.sleep(0.25)
    raise AssertionError(f"step {step} never came: {log(folder, job)}")


def log(folder: Path, job: str) -> str:
    return (folder / f"tiny-{job}.out").read_text()


def last_step(folder: Path) -> int:
    return max(int(found.name.removeprefix("step-")) for found in (folder / "runs/tiny/checkpoints").glob("step-*"))


def test_preempted_twice_and_the_same_run_in_the_end(cluster, submit):
    job, folder = submit("stopped")
    until_step(cluster, job, folder, 10)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.begin_now(job)
    first = last_step(folder)
    assert 10 <= first < 120
    until_step(cluster, job, folder, first + 10)
    # Slurm's own preemption: SIGTERM to the tasks, SIGKILL after GraceTime.
    urgent = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = cluster.run(*urgent, "--wrap", "sleep 1")
    began = time.monotonic()
    cluster.until(job, "PENDING")
    assert time.monotonic() - began < 60, "it was ended by SIGKILL"
    second = last_step(folder)
    assert first + 10 <= second < 120
    cluster.until(other, "COMPLETED")
    cluster.begin_now(job)
    cluster.until(job, "COMPLETED")
    text = log(folder, job)
    assert text.count("queued again") == 2 and f"going on from step-{second}" in text
    assert "Restarts=2" in cluster.run("scontrol", "show", "job", job)
    assert "engine: DDP on 2 processes (gloo)" in text
    whole, beside = submit("whole")
    cluster.until(whole, "COMPLETED")
    losses = metric(folder / "runs" / "tiny")
    assert len(losses) == 120 and losses == metric(beside / "runs" / "tiny")


def test_a_cancelled_job_stays_cancelled(cluster, submit):
    job, folder = submit("cancelled")
    until_step(cluster, job, folder, 5)
    cluster.run("scancel", job)
    assert cluster.until(job, "CANCELLED") == "CANCELLED"
    time.sleep(5)
    assert cluster.state(job) == "CANCELLED" and "queued again" not in log(folder, job)


def test_a_users_mistake_ends_the_job_with_2(cluster, submit):
    job, folder = submit("mistake", "training.max_steps=5")
    assert cluster.until(job, "COMPLETED") == "COMPLETED"
    # The same name with another length: --resume is refused, and nothing is queued again.
    text = (folder / "tiny.sbatch").read_text().replace("training.max_steps=5", "training.max_steps=7")
    (folder / "other.sbatch").write_text(text)
    done = subprocess.run(
        ["sbatch", "--parsable", "other.sbatch"], cwd=folder, env=cluster.environment, capture_output=True, text=True
    )
    other = done.stdout.strip()
    assert cluster.until(other, "FAILED") == "FAILED"
    assert "ExitCode=2:0" in cluster.run("scontrol", "show", "job", other)
    assert "training.max_steps: this run began with 5" in log(folder, other)


def test_told_before_the_time_is_up(cluster, submit):
    """--signal=B: reaches the script alone, which tells the tasks."""
    job, folder = submit("late")
    until_step(cluster, job, folder, 10)
    cluster.run("scancel", "--batch", "--signal=TERM", job)
    cluster.until(job, "PENDING")
    assert last_step(folder) < 120
    cluster.run("scancel", job)
