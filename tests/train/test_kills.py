"""Killed with SIGKILL at twenty seeded moments and resumed: losses and weights are the unbroken run's, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest

from tests.train.conftest import ENVIRONMENT, command, run_command
from tests.train.kills import SITES, VARIANTS, Bench

SEED = 5
KILLS = dict(zip(VARIANTS, (3, 3, 4, 4, 3, 3), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_becomes_the_unbroken_one(small_base, tmp_path, variant):
    if variant.startswith("qlora"):
        pytest.importorskip("bitsandbytes")
    assert sum(KILLS.values()) == 20
    place = list(VARIANTS).index(variant)
    bench = Bench(tmp_path, small_base, variant)
    bench.unbroken()
    wanted = list(SITES[place :: len(VARIANTS)])
    done = bench.killed("killed", KILLS[variant], random.Random(f"{SEED} {variant}"), wanted)
    assert len(done) == KILLS[variant]
    assert not wanted, f"never reached: {wanted}"
    assert bench.differs("killed") == [], f"{done}"


def test_killed_from_outside_through_the_launcher(small_base, tmp_path):
    """`accelerate launch` and its trainer die at once, as when a machine is taken away."""
    bench = Bench(tmp_path, small_base, "lora, packed")
    bench.unbroken()
    settings = [*bench.settings, f"output_dir={tmp_path / 'killed'}"]
    process = subprocess.Popen(
        command(settings), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL
    resumed = run_command(settings, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step-2" in resumed.stdout
    assert bench.differs("killed") == []


@pytest.mark.slow
def test_the_soak_counts_goes_on_and_tells(small_base, tmp_path):
    """Two kills, and two more of the four that a second call asks for."""
    line = [sys.executable, "-m", "tests.soak", "--folder", str(tmp_path), "--base", str(small_base)]
    only = ["--only", "lora, packed"]
    for kills in (2, 4):
        done = subprocess.run([*line, *only, "--kills", str(kills)], capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{kills} kills, all runs bit-identical" in done.stdout
    assert "2 kills were done before" in done.stdout
