"""The main door and `llama-ft train`: exit codes, no traceback for a user's mistake, a clean stop and a resume."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from llama_ft.train.launch import launch_command
from tests.train.conftest import ENVIRONMENT, metric, run_command

LLAMA_FT = [sys.executable, "-m", "llama_ft.cli", "train", "quickstart"]


def test_launch_line():
    line = launch_command("quickstart", ["training.max_steps=3"], ["--resume"])
    assert line[1:4] == ["-m", "accelerate.commands.launch", "--quiet"]
    config = line.index("--config_file") + 1
    assert line[config].endswith("accelerate_configs/cpu.yaml")
    assert line[config + 1 :] == ["-m", "llama_ft.train", "quickstart", "training.max_steps=3", "--resume"]


@pytest.mark.parametrize("door", ["llama-ft train", "accelerate launch"])
def test_a_users_mistake_is_one_block(overrides, tmp_path, door):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 3}]}\n')
    bad = [*overrides, f"data.0.path={rows}"]
    if door == "llama-ft train":
        done = subprocess.run([*LLAMA_FT, *bad], capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 2
    else:
        done = run_command(bad)
        assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"{rows}, row 0" in done.stderr
    assert "3" in done.stderr
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_run_goes_on_exactly(overrides, tmp_path, number):
    """A signal in the middle of training: checkpoint, words on how to go on, and the same losses afterwards."""
    settings = [*overrides, "training.max_steps=16", "training.save_every=100", "export.merged=false"]
    process = subprocess.Popen(
        [*LLAMA_FT, *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,  # a group of its own, as a shell gives every job
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            if number == signal.SIGINT:  # the terminal sends Ctrl-C to the whole group
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            break
    lines += list(process.stdout)
    process.wait(timeout=120)
    text = "".join(lines)
    assert "Traceback" not in text, text
    stopped = re.search(r"stopped after step (\d+)", text)
    assert stopped, text
    assert "--resume" in text
    step = int(stopped[1])
    assert 3 <= step < 16
    assert (tmp_path / "run" / "checkpoints" / f"step-{step}").is_dir()
    resumed = subprocess.run([*LLAMA_FT, *settings, "--resume"], capture_output=True, text=True, env=ENVIRONMENT)
    assert resumed.returncode == 0, resumed.stderr
    whole = [*settings[:-1], "export.merged=false", f"output_dir={tmp_path / 'whole'}"]
    assert run_command(whole).returncode == 0
    assert metric(tmp_path / "run") == metric(tmp_path / "whole")
    assert len(metric(tmp_path / "run")) == 16


def test_killed_run_keeps_its_last_checkpoint(overrides, tmp_path):
    # At a constant rate a run may become shorter than it was begun.
    constant = ["training.schedule=constant", "training.warmup=0"]
    settings = [*overrides, *constant, "training.max_steps=40", "export.merged=false"]
    process = subprocess.Popen(
        [*LLAMA_FT, *settings], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    for line in process.stdout:
        if line.startswith("step 5/"):
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait(timeout=60)
    time.sleep(0.5)
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert "step-4" in found
    short = [o for o in settings if not o.startswith("training.max_steps")]
    resumed = subprocess.run(
        [*LLAMA_FT, *short, "training.max_steps=8", "--resume"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert resumed.returncode == 0, resumed.stderr
    assert len(metric(tmp_path / "run")) == 8
