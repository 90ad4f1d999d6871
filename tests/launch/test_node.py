"""What bash does on a node: signals reach the trainers and not their launcher, and the trainer's status comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from llama_ft.launch.commands import launch_recipe

LAUNCHER = """\
import json, os, subprocess, sys, time
from pathlib import Path
here = Path(os.environ["HERE"])
names = ("LLAMA_FT_ASKED", "PET_SIGNALS_TO_HANDLE", "PET_SHUTDOWN_TIMEOUT")
(here / "launched.json").write_text(json.dumps([sys.argv[1:], {name: os.environ[name] for name in names}]))
time.sleep(float(os.environ.get("SLOW", "0")))
trainers = [subprocess.Popen([sys.executable, "-c", os.environ["TRAINER"]]) for _ in range(2)]
for trainer in trainers:
    trainer.wait()
sys.exit(any(trainer.returncode for trainer in trainers))  # as launchers do: 1, whatever it was
"""
STOPS = """\
import os, signal, sys, time
def stop(number, frame):
    time.sleep(1)  # a checkpoint is written
    try:
        open(os.environ["LLAMA_FT_STATUS_FILE"], "x").write("130")
    except FileExistsError:
        pass
    print("whole", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
open(os.environ["HERE"] + f"/ready-{os.getpid()}", "w").close()
time.sleep(60)
"""
FAILS = "import os; open(os.environ['LLAMA_FT_STATUS_FILE'], 'a').write('2'); raise SystemExit(2)"


@pytest.fixture
def pod(here, capsys, tmp_path):
    """The script of a Kubernetes pod, which is that of a node and little more; `accelerate` is a stand-in."""
    launch_recipe("tiny.yaml", [], on="kubernetes", nodes=2, dry_run=True)
    script = list(yaml.safe_load_all(capsys.readouterr().out))[1]["spec"]["trainer"]["command"][2]
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "accelerate").write_text(f"#!{sys.executable}\n{LAUNCHER}")
    (commands / "accelerate").chmod(0o755)
    rank = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "tiny-node-0-0.tiny", "PET_MASTER_PORT": "29400"}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def started(**environment: str) -> subprocess.Popen[str]:
        everything = os.environ | rank | {"PATH": path, "HERE": str(here), "TRAINER": STOPS} | environment
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "-c", script], cwd=here, env=everything, start_new_session=True, **pipes)

    return started


def launched(here: Path) -> tuple[list[str], dict[str, str]]:
    return json.loads((here / "launched.json").read_text())


def ready(here: Path) -> None:
    for _ in range(300):
        if len(list(here.glob("ready-*"))) == 2:
            return
        time.sleep(0.1)
    raise AssertionError("the trainers never came up")


def test_the_line_of_a_node(pod, here):
    assert pod(TRAINER="").wait(timeout=60) == 0
    arguments, environment = launched(here)
    told = dict(pairwise(arguments))
    assert arguments[0] == "launch" and Path(told["--config_file"]).name == "cpu_ddp_2.yaml"
    assert Path(told["--config_file"]).is_file()
    assert (told["--num_machines"], told["--num_processes"], told["--machine_rank"]) == ("2", "2", "1")
    assert (told["--main_process_ip"], told["--main_process_port"]) == ("tiny-node-0-0.tiny", "29400")
    assert arguments[arguments.index("-m") :] == ["-m", "llama_ft.train", "tiny.yaml"]
    assert json.loads(environment["LLAMA_FT_ASKED"]) == {"engine": "DDP", "processes": 2, "use_cpu": True}
    assert "SIGTERM" not in environment["PET_SIGNALS_TO_HANDLE"]


def test_the_names_are_the_trainers_own(pod, here):
    from llama_ft.train.launch import ASKED, STATUS_FILE

    assert pod(TRAINER="").wait(timeout=60) == 0
    assert (ASKED, STATUS_FILE) == ("LLAMA_FT_ASKED", "LLAMA_FT_STATUS_FILE")


@pytest.mark.parametrize("there", [False, True])
def test_resumes_exactly_when_the_run_is_there(pod, here, there):
    run = here / "runs" / "tiny"
    run.mkdir(parents=True)
    if there:
        (run / "recipe.yaml").write_text("name: tiny\n")
    assert pod(TRAINER="").wait(timeout=60) == 0
    assert (launched(here)[0][-1] == "--resume") is there


@pytest.mark.parametrize("group", [False, True], ids=["the shell alone", "every process"])
def test_sigterm_is_for_the_trainers(pod, here, group):
    """To the shell alone (a pod's process 1), or to all as Slurm does: both trainers end in their own time."""
    node = pod()
    ready(here)
    (os.killpg if group else os.kill)(node.pid, signal.SIGTERM)
    text, _ = node.communicate(timeout=60)
    assert node.returncode == 130 and text.count("whole") == 2, text


def test_sigterm_before_there_are_trainers(pod, here):
    """They are told as soon as they are there."""
    node = pod(SLOW="3")
    while not (here / "launched.json").exists():
        time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    text, _ = node.communicate(timeout=90)
    assert node.returncode == 130 and text.count("whole") == 2, text


def test_the_trainers_status_comes_back(pod):
    assert pod(TRAINER=FAILS.replace("'a'", "'w'")).wait(timeout=60) == 2


def test_a_launch_config_that_is_not_there(pod, here, tmp_path):
    """A machine that lacks the file says so, with a user's exit status."""
    node = pod(PYTHONPATH=str(tmp_path / "empty"), PATH=f"{tmp_path / 'other'}:/usr/bin:/bin")
    (tmp_path / "other").mkdir(exist_ok=True)
    text, _ = node.communicate(timeout=60)
    assert node.returncode == 2, text
