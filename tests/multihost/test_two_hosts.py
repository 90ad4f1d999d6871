"""One run on two hosts by `multi_node.yaml`: the curve of one process; a cut cable ends both, and the run goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ft.recipe.run import Run
from llama_ft.train.checkpoints import verify
from llama_ft.train.verdict import LOST
from tests.conftest import ROOT
from tests.multihost.hosts import Hosts, two_hosts, why_not
from tests.train.conftest import ENVIRONMENT, metric
from tests.train.ranks import block_of

STEPS = 40
SLACK = 10.0
"""Seconds beside the bound: beats, what the others are given to hear, and the end of a process and its launcher."""
SETTINGS = [
    "model.dtype=float32",
    "data.0.limit=24",
    "eval_data=null",
    "training.global_batch=4",
    "training.micro_batch=1",
    "training.save_every=3",
    "training.keep_checkpoints=3",
    f"training.max_steps={STEPS}",
    "export.merged=false",
    "tracking=[]",
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped multi_node.yaml for two CPUs in place of sixteen GPUs."""
    text = (ROOT / "accelerate_configs" / "multi_node.yaml").read_text(encoding="utf-8")
    for shipped, here in (("use_cpu: false", "use_cpu: true"), ("num_processes: 16", "num_processes: 2")):
        assert text.count(shipped) == 1
        text = text.replace(shipped, here)
    path = tmp_path_factory.mktemp("config") / "multi_node.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def single(tiny_base, tmp_path_factory) -> Path:
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    line = [sys.executable, "-m", "llama_ft.train", "quickstart", *settings(tiny_base, folder)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def settings(base: Path, run: Path) -> list[str]:
    return [f"model.base={base}", *SETTINGS, f"output_dir={run}"]


class Training:
    """One run on both hosts, started by `llama-ft train`, each with its log."""

    def __init__(self, hosts: Hosts, folder: Path, overrides: list[str], *flags: str):
        self.logs = {host: folder / f"{host}.log" for host in "ab"}
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
        self.processes = {}
        for rank, host in enumerate("ab"):
            line = [sys.executable, "-m", "llama_ft.cli", "train", "quickstart", *overrides, *flags]
            line += ["--machine-rank", str(rank), "--main-process-ip", hosts.address("a")]
            self.processes[host] = hosts.start(host, line, self.logs[host], environment)

    def said(self, host: str) -> str:
        return self.logs[host].read_text(encoding="utf-8")

    def until(self, text: str, seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while text not in self.said("a"):
            running = all(process.poll() is None for process in self.processes.values())
            assert running and time.monotonic() < end, self.said("a") + self.said("b")
            time.sleep(0.05)

    def wait(self, seconds: float) -> dict[str, int]:
        end = time.monotonic() + seconds
        return {host: process.wait(max(0.1, end - time.monotonic())) for host, process in self.processes.items()}


def test_two_hosts_train_as_one_process(hosts, config, single, tiny_base, tmp_path):
    training = Training(hosts, tmp_path, [*settings(tiny_base, tmp_path / "run"), f"launch={config}"])
    assert training.wait(200) == {"a": 0, "b": 0}, training.said("a") + training.said("b")
    assert "engine: DDP on 2 processes (gloo), float32 on cpu" in training.said("a")
    assert len(metric(tmp_path / "run")) == STEPS
    assert metric(tmp_path / "run") == pytest.approx(metric(single), abs=1e-5)


def test_a_cut_cable_ends_both_hosts_and_the_run_goes_on(hosts, config, single, tiny_base, tmp_path):
    run = tmp_path / "run"
    longer = [*settings(tiny_base, run), f"launch={config}"]
    training = Training(hosts, tmp_path, [*longer, "training.keep_checkpoints=100", "training.save_every=1"])
    try:
        training.until("step 4/")
        hosts.cut()
        began = time.monotonic()
        assert training.wait(LOST + SLACK) == {"a": 1, "b": 1}, training.said("a") + training.said("b")
        print(f"both ended {time.monotonic() - began:.1f} s after the cut")
    finally:
        hosts.mend()
    for host in "ab":
        assert "Traceback" not in training.said(host), training.said(host)
        assert training.said(host).count("llama-ft: stopped by the machine") == 1
        assert training.said(host).endswith(block_of(training.said(host)))
    last = Run(run).steps()[-1]
    assert 3 <= last < STEPS
    here, there = block_of(training.said("a")), block_of(training.said("b"))
    assert re.search(r"rank 1 on host-b \(process \d+\) was lost: no sign of life since", here)
    assert re.search(r"the launcher of rank 0 on host-a was lost: 10\.\d+\.\d+\.1:\d+ does not answer", there)
    for block in (here, there):
        assert f"checkpoint step-{last} is whole, go on with the same command and --resume" in block
    assert all(verify(Run(run).checkpoint(step)) == [] for step in Run(run).steps())
    resumed = Training(hosts, tmp_path, longer, "--resume")
    assert resumed.wait(200) == {"a": 0, "b": 0}, resumed.said("a") + resumed.said("b")
    assert f"going on from step-{last}" in resumed.said("a")
    assert metric(run) == pytest.approx(metric(single), abs=1e-5)
    assert len(metric(run)) == STEPS
