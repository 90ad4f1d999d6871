"""Processes meet before anything is loaded: who does not come, runs something else or writes elsewhere is named."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from llama_ft import load_recipe
from llama_ft.errors import MachineFault, UserError
from llama_ft.recipe import resolve
from llama_ft.recipe.launchers import Launcher, read_launcher
from llama_ft.train import start
from llama_ft.train.agents import meet
from llama_ft.train.join import ranks_named
from llama_ft.train.launch import Machines, launch_command, meeting
from llama_ft.train.ports import holder_of, port_in_use
from llama_ft.train.together import device_to, exchange_failed
from tests.conftest import ROOT
from tests.train.conftest import ENVIRONMENT
from tests.train.ranks import Hook, Ranks, block_of, free_port

SLACK = 6.0
"""Seconds beside the bound: the start of a process, and its end, on a loaded machine."""
HOST = os.uname().nodename
SETTINGS = [
    "model.dtype=float32",
    "data.0.limit=24",
    "eval_data=null",
    "training.global_batch=4",
    "training.max_steps=2",
    "export.merged=false",
    "tracking=[]",
]


@pytest.fixture
def ranks(tiny_base, tmp_path) -> Iterator[Ranks]:
    made = Ranks(tmp_path, [f"model.base={tiny_base}", *SETTINGS])
    yield made
    made.end()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which this process listens."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def refused(ranks: Ranks, seconds: float, status: int) -> str:
    """All processes end with a status within so many seconds, before the run folder is there; returns the block."""
    began = time.monotonic()
    assert set(ranks.wait(seconds + SLACK).values()) == {status}
    print(f"refused after {time.monotonic() - began:.1f} s")
    assert not (ranks.folder / "run").exists()
    assert not list(ranks.folder.glob(".run.*")), "the token is left"
    return ranks.block()


@pytest.mark.parametrize(
    ("world", "come", "missing"),
    [(2, [0], "rank 1"), (4, [0, 2], "ranks 1, 3"), (3, [1, 2], "rank 0")],
    ids=["rank 1", "two of four", "rank 0, which keeps the store"],
)
def test_who_does_not_come_is_named(tiny_base, tmp_path, world, come, missing):
    ranks = Ranks(tmp_path, [f"model.base={tiny_base}", *SETTINGS, "training.join_timeout=3"], world=world)
    try:
        for rank in come:
            ranks.start(rank, **({"LOCAL_RANK": "0"} if rank == min(come) else {}))
        block = refused(ranks, 3, 1)
    finally:
        ranks.end()
    assert f"{missing} did not come within 3 s" in block
    assert "nothing is lost, start again with the same command" in block
    if 0 in come:
        assert f"these came: {ranks_named(come)} on {HOST}" in block


def test_machines_are_named_where_the_launcher_counts_their_processes(ranks):
    ranks.world = 4
    for rank in (0, 1, 2):
        group = {"GROUP_RANK": str(rank // 2), "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
        ranks.start(rank, "training.join_timeout=3", **group)
    assert set(ranks.wait(3 + SLACK).values()) == {1}
    everything = "".join(map(ranks.said, range(3)))
    assert everything.count("llama-ft: ") == 2  # one on each of the two machines
    assert block_of(everything).startswith("llama-ft: stopped by the machine (2 problems)")
    assert f"rank 3 on {HOST} did not come within 3 s" in everything


@pytest.mark.parametrize(
    ("change", "hook", "said"),
    [
        ([], Hook("versions"), rf"torch is 2\.12\.0, and {re.escape(torch.__version__)} on rank 0 on {HOST}"),
        (["training.learning_rate=0.5"], Hook(), rf"training\.learning_rate: is 0\.5, and .* on rank 0 on {HOST}"),
        (["training.micro_batch=1"], Hook(), r"training\.micro_batch: is 1, and 'auto'"),
        (["training.save_every=1"], Hook(), r"training\.save_every: is 1, and 100"),
    ],
    ids=["version", "recipe", "how a step is cut", "when it waits for the others"],
)
def test_what_differs_is_named_with_both_values(ranks, change, hook, said):
    ranks.start(0)
    ranks.start(1, *change, hook=hook)
    block = refused(ranks, 10, 2)
    assert block.startswith("llama-ft: cannot go on (1 problem)\n")
    assert re.search(rf"rank 1 on {HOST}: {said}", block), block


def test_what_does_not_matter_may_differ(ranks):
    ranks.start(0)
    ranks.start(1, "launch=accelerate_configs/ddp.yaml")
    assert ranks.wait(60) == {0: 0, 1: 0}, ranks.said(0) + ranks.said(1)


def test_a_folder_that_is_not_shared_is_refused(ranks, tmp_path):
    ranks.start(0)
    ranks.start(1, f"output_dir={tmp_path / 'elsewhere' / 'run'}")
    block = refused(ranks, 20, 2)
    assert f"rank 1 on {HOST}: output_dir: {tmp_path / 'elsewhere' / 'run'} is not the folder that rank 0" in block


def test_a_port_in_use_is_named_with_who_holds_it(ranks, taken):
    ranks.port = taken
    ranks.start(0)
    block = refused(ranks, 0, 1)
    assert f"port {taken}, on which the processes of this run should meet, is in use by " in block
    assert f"(process {os.getpid()})" in block


def test_ports(taken):
    assert port_in_use(taken) and not port_in_use(0)
    assert not port_in_use(free_port())
    assert f"(process {os.getpid()})" in str(holder_of(taken))
    assert holder_of(free_port()) is None


def several(**changes) -> Launcher:
    return Machines(**changes).over(Launcher(False, 16, "DDP", machines=2, port=29511))


def test_machines_are_said_beside_the_config():
    launcher = several(rank=1, address="10.0.0.1")
    assert (launcher.machine_rank, launcher.address, launcher.port) == (1, "10.0.0.1", 29511)
    assert Machines().over(Launcher(True, 1, "")) == Launcher(True, 1, "")
    with pytest.raises(UserError, match="nothing says where the machines meet"):
        several(rank=0)
    with pytest.raises(UserError, match="there is no machine 2"):
        several(rank=2, address="10.0.0.1")
    with pytest.raises(UserError, match="16 processes cannot be shared by 3 machines"):
        several(rank=2, address="10.0.0.1", machines=3)
    alone = Launcher(False, 8, "FSDP2")
    for said, what in (({"rank": 1}, "this is machine 1"), ({"address": "10.0.0.1"}, "meets nobody at 10.0.0.1")):
        with pytest.raises(UserError, match=what) as error:  # two of them would train alone into one folder
            Machines(**said).over(alone)
        assert "--num-machines" in error.value.block()
    assert Machines(rank=0, port=29511).over(alone).port == 29511


@pytest.mark.parametrize("port", [None, 29511])
@pytest.mark.parametrize("config", ["multi_node", "fsdp2", "zero3"])
def test_the_line_of_several_machines(config, port):
    """As accelerate itself reads it: a config of one machine says port 0, which would be another on each."""
    overrides = [f"launch=accelerate_configs/{config}.yaml"]
    line = launch_command("quickstart", overrides, [], Machines(1, "10.0.0.1", port, machines=4, processes=32))
    for option, value in (("machine_rank", "1"), ("main_process_ip", "10.0.0.1"), ("num_machines", "4")):
        assert line[line.index(f"--{option}") + 1] == value
    assert line[line.index("--num_processes") + 1] == "32"
    assert line.count("--main_process_port") == 1
    read, _, _ = _validate_launch_command(launch_command_parser().parse_args(line[3:]))
    assert (read.main_process_port, read.rdzv_backend, read.same_network) == (port or 29500, "static", True)
    assert read.deepspeed_multinode_launcher == ("standard" if config == "zero3" else None)
    assert read.training_script == "llama_ft.train"
    where = f"--meet=10.0.0.1:{port or 29500}"
    launcher = Machines(1, "10.0.0.1", port, 4, 32).over(resolve("quickstart", overrides).launcher)
    assert where in meeting(launcher, load_recipe("quickstart"))


def test_one_machine_says_no_port():
    line = launch_command("quickstart", ["launch=accelerate_configs/fsdp2.yaml"], [])
    assert not {"--main_process_port", "--same_network", "--rdzv_backend"} & set(line)


def test_a_port_in_use_is_said_before_anything_starts(taken):
    recipe = load_recipe("quickstart")
    launcher = several(rank=0, address="127.0.0.1", port=taken)
    with pytest.raises(MachineFault, match=rf"port {taken}, .* in use by .*\(process {os.getpid()}\)"):
        meeting(launcher, recipe)
    other = meeting(several(rank=1, address="127.0.0.1", port=taken), recipe)  # its port is another machine's
    assert other == [f"--meet=127.0.0.1:{taken}", "--machine=1", "--of=2", "--within=300"]
    assert meeting(Launcher(True, 2, "DDP", port=taken), recipe) == []


def test_one_machine_takes_a_free_port():
    """accelerate takes any free one for 0: two runs at once do not meet on the same."""
    for path in sorted((ROOT / "accelerate_configs").glob("*.yaml")):
        found = read_launcher(path)
        assert isinstance(found, Launcher)
        if found.processes > 1 and found.machines == 1:
            assert "\nmain_process_port: 0" in path.read_text(encoding="utf-8"), path


def launchers_meet(come: list[int], machines: int, seconds: float) -> tuple[dict[int, str | None], float]:
    """What the launchers that come say, None for those that met all others, and how long it took."""
    said: dict[int, str | None] = {}
    port = free_port()

    def one(machine: int) -> None:
        try:
            meet("127.0.0.1", port, machine, machines, seconds)
            said[machine] = None
        except MachineFault as fault:
            said[machine] = fault.block()

    threads = [threading.Thread(target=one, args=(machine,)) for machine in come]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not port_in_use(port)  # it is the run's from here on
    return said, time.monotonic() - began


def test_launchers_meet_and_leave_the_port_free():
    said, _ = launchers_meet([0, 1, 2], 3, 20)
    assert said == {0: None, 1: None, 2: None}


@pytest.mark.parametrize(("come", "missing"), [([0, 2], 1), ([1, 2], 0)])
def test_a_machine_that_does_not_come_is_named_on_all_others(come, missing):
    said, took = launchers_meet(come, 3, 3)
    assert took < 3 + SLACK
    for block in said.values():
        assert block is not None and f"machine {missing} did not come within 3 s" in block
        if missing:
            assert f"these came: machine 0 ({HOST}), machine 2 ({HOST})" in block


def test_a_machine_0_that_comes_and_dies_is_lost():
    """It is not said to have stayed away."""
    port = free_port()
    code = (
        "import os, time, torch.distributed as dist\n"
        f"store = dist.TCPStore('127.0.0.1', {port}, is_master=True, wait_for_workers=False)\n"
        "while not store.check(['machine/1']): time.sleep(0.05)\n"
        "os._exit(9)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        with pytest.raises(MachineFault) as fault:
            meet("127.0.0.1", port, 1, 2, 60)
    finally:
        other.kill()
        other.wait()
    assert f"machine 0 (127.0.0.1:{port}) was lost while the launchers met" in fault.value.block()
    assert "did not come" not in fault.value.block()


def test_several_cpu_processes_are_started_by_torchrun(tmp_path):
    config = tmp_path / "launch.yaml"
    config.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 2\n")
    line = launch_command("quickstart", [f"launch={config}"], ["--overwrite"])
    assert line[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "llama_ft.train", "quickstart", f"launch={config}", "--overwrite"),
    ]
    plan = [sys.executable, "-m", "llama_ft.cli", "plan", "quickstart", f"launch={config}"]
    done = subprocess.run(plan, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert "torchrun --standalone --nproc-per-node 2 -m llama_ft.train quickstart" in done.stdout, done.stderr
    config.write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 2\n")
    assert not resolve("quickstart", [f"launch={config}"]).launcher.torchrun


def test_ranks_in_words():
    assert ranks_named([3]) == "rank 3"
    assert ranks_named([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_the_device_that_reaches_another_machine():
    assert device_to("127.0.0.1") is None
    assert device_to("no such machine.invalid") is None
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and name != "lo":
                assert device_to(one.address) == name


@pytest.mark.parametrize(("here", "threads"), [("1", 8), ("2", 4), (None, 2)], ids=["alone here", "two here", "unsaid"])
def test_cores_are_shared_by_the_processes_of_this_machine(monkeypatch, here, threads):
    """Of four processes: what another machine runs takes no core of this one."""
    monkeypatch.setattr(start, "usable_cores", lambda: 8)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    start.use_all_cores(SimpleNamespace(device=torch.device("cpu"), num_processes=4))  # type: ignore[arg-type]
    assert set_to == [threads]


def test_which_errors_are_those_of_an_exchange():
    assert exchange_failed(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"))
    assert exchange_failed(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert not exchange_failed(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not exchange_failed(KeyError("gloo"))


def test_what_llama_ft_train_says_of_a_rank_that_cannot_be(tmp_path):
    config = ["launch=accelerate_configs/multi_node.yaml"]
    line = [sys.executable, "-m", "llama_ft.cli", "train", "quickstart", *config]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT | {"MACHINE_RANK": "2"}, cwd=ROOT)
    assert done.returncode == 2
    assert "there is no machine 2" in done.stderr and "nothing says where the machines meet" in done.stderr
    assert "Traceback" not in done.stderr
