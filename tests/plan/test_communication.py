"""Bytes exchanged in a step: by hand, against what processes put on the wire, and through `plan`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import psutil
import pytest

from benchmarks import scaling
from benchmarks.exchange import Setting, measured, namespaces_allowed, run_whole
from llama_ft.llama.shapes import PRESETS
from llama_ft.plan.commands import plan_recipe
from llama_ft.plan.communication import exchange, whole_pass
from llama_ft.plan.engine import Engine
from llama_ft.train import lock
from tests.plan.conftest import case

EIGHT, ONE = PRESETS["llama-3.1-8b"], PRESETS["llama-3.2-1b"]
P = EIGHT.parameters
TABLE = EIGHT.vocabulary * EIGHT.hidden


def full(name: str, devices: int = 8, **keys):
    return case(EIGHT, adapter__method="full", engine=Engine(name, devices), **keys)


def test_full_tuning_of_8b_on_eight_gpus_by_hand():
    """ZeRO §7.1: an all-reduce sends 2(n−1)/n of the gradients. DDP in float32, the others in 16 bits."""
    ring = 7 / 8
    assert exchange(full("DDP"), 4).sent == pytest.approx(2 * ring * 4 * P)
    assert exchange(full("ZeRO-1"), 4).sent == pytest.approx(3 * ring * 2 * P)
    assert exchange(full("ZeRO-2"), 4).sent == pytest.approx((2 * 4 + 1) * ring * 2 * P)
    fsdp = exchange(full("FSDP2"), 4)
    assert fsdp.gathered == pytest.approx(4 * ring * 2 * (2 * (P - 2 * TABLE) + 3 * TABLE), rel=1e-5)
    assert fsdp.reduced == pytest.approx(4 * ring * 2 * P)
    zero3 = exchange(full("ZeRO-3"), 1)
    assert zero3.reduced == pytest.approx(ring * 2 * P)
    assert zero3.gathered == pytest.approx(ring * 2 * (2 * P - TABLE - 5e8 * (P - TABLE) / P), rel=0.01)
    # the paper's 3Ψ, a reduce-scatter and two gathers, less what stays
    assert 2.8 * ring * 2 * P < zero3.sent < 3 * ring * 2 * P


def test_lora_exchanges_its_factors_alone_but_shards_of_everything_are_gathered():
    factors = 41_943_040
    assert exchange(case(EIGHT, engine=Engine("DDP", 8)), 16).sent == pytest.approx(2 * 7 / 8 * 4 * factors)
    sharded = exchange(case(EIGHT, engine=Engine("FSDP2", 8)), 1)
    assert sharded.reduced == pytest.approx(7 / 8 * 2 * factors)
    assert sharded.gathered == pytest.approx(7 / 8 * 2 * (2 * (P - 2 * TABLE + factors) + 3 * TABLE), rel=1e-5)


def test_quantised_weights_go_as_they_are_stored():
    plain, small = (
        whole_pass(case(EIGHT, engine=Engine("FSDP2", 8), adapter__method=method)) for method in ("lora", "qlora")
    )
    assert small < plain / 2.5


def test_one_device_sends_nothing_and_offloading_moves_bytes_to_the_host():
    alone = exchange(case(ONE, adapter__method="full"), 4)
    assert alone.sent == alone.host == 0
    offloaded = exchange(case(ONE, adapter__method="full", engine=Engine("ZeRO-3", 1, offload=True)), 4)
    # weights brought for both passes and gradients taken away, four times, in 16 bits
    assert offloaded.sent == 0 and offloaded.host == pytest.approx(4 * 3 * 2 * ONE.parameters)
    states = (
        exchange(full("ZeRO-2", 8), 4),
        exchange(case(EIGHT, adapter__method="full", engine=Engine("ZeRO-2", 8, offload=True)), 4),
    )
    assert states[0].sent == states[1].sent and states[1].host == pytest.approx(5 * 2 * P / 8)


def test_more_devices_send_more_each_up_to_a_limit():
    sizes = [exchange(full("ZeRO-1", devices), 1).sent for devices in (1, 2, 8, 64, 512)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] < 3 * 2 * P


MEASURED = {
    Setting("DDP", passes=3): 16_021_232,
    Setting("DDP", "lora", passes=3): 1_200_735,
    Setting("ZeRO-1", passes=3): 24_032_438,
    Setting("ZeRO-1", "lora", passes=3): 1_797_973,
    Setting("ZeRO-2", passes=3): 56_230_156,
    Setting("ZeRO-2", processes=4): 36_090_000,
    Setting("FSDP2", passes=3): 93_000_803,
    Setting("FSDP2", checkpointing=True): 31_021_083,
    Setting("FSDP2", "lora"): 17_381_367,
    Setting("FSDP2", tied=True): 26_792_289,
    Setting("FSDP2", processes=4): 46_542_343,
}
"""Bytes a process and step, by benchmarks/exchange.py; the kernel's headers are in them."""
MEASURED_ZERO3 = {
    Setting("ZeRO-3"): 30_305_912,
    Setting("ZeRO-3", passes=3): 91_086_164,
    Setting("ZeRO-3", checkpointing=True): 30_707_953,
    Setting("ZeRO-3", "lora"): 15_335_462,
    Setting("ZeRO-3", "lora", checkpointing=True): 23_362_289,
    Setting("ZeRO-3", tied=True): 28_211_354,
    Setting("ZeRO-3", processes=4): 45_531_879,
}


@pytest.mark.parametrize("setting", MEASURED, ids=str)
def test_the_formula_is_what_was_measured(setting):
    assert 1.0 <= MEASURED[setting] / setting.planned() <= 1.011


@pytest.mark.parametrize("setting", MEASURED_ZERO3, ids=str)
def test_zero3_is_near_what_was_measured(setting):
    """DeepSpeed decides as it goes what it keeps: with LoRA 7 % less was sent than calculated, elsewhere 2 % more."""
    assert 0.93 <= MEASURED_ZERO3[setting] / setting.planned() <= 1.021


@pytest.mark.skipif(not namespaces_allowed(), reason="needs a network namespace: root, unshare and ip")
@pytest.mark.parametrize("setting", [Setting("DDP", "lora", passes=2), Setting("FSDP2", passes=2)], ids=str)
def test_what_two_processes_send_now(setting):
    assert 1.0 <= measured(setting) / setting.planned() <= 1.02


@pytest.mark.slow
@pytest.mark.skipif(not namespaces_allowed(), reason="needs a network namespace: root, unshare and ip")
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
@pytest.mark.parametrize("setting", [Setting("ZeRO-1", passes=3), Setting("ZeRO-2", passes=3)], ids=str)
def test_what_two_processes_of_deepspeed_send_now(setting):
    assert 1.0 <= measured(setting) / setting.planned() <= 1.02


def test_plan_tells_it(capsys):
    plan_recipe("alpaca/llama-7b-full", [], hardware="8xA100-80")
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("exchange"))
    assert "sent per device and step (calculation): gradients " in line and ", weights " in line
    plan_recipe("alpaca/llama-7b-full", [], hardware="8xA100-80", as_json_text=True)
    told = json.loads(capsys.readouterr().out)["exchange"]
    assert told["sent"] == told["reduced"] + told["gathered"] > told["reduced"] > told["host"] == 0
    plan_recipe("guanaco/llama-7b-qlora", [], hardware="4090")
    assert "exchange" not in capsys.readouterr().out


def test_nothing_is_left_of_processes_that_take_too_long(tmp_path):
    """A worker is in a session of its own, as torchrun's are."""
    inner = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    outer = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], start_new_session=True)"
    command = [sys.executable, "-c", outer, "-c", inner, str(tmp_path / "pid")]
    with pytest.raises(subprocess.TimeoutExpired):
        run_whole(command, dict(os.environ), 5)
    assert ended(int((tmp_path / "pid").read_text()))


def ended(pid: int, seconds: float = 10) -> bool:
    """Whether a process comes to its end; one that nobody reaps, as in a container, has ended too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_scaling_is_measured_without_deepspeed(monkeypatch):
    def version(name: str) -> str:
        if name == "deepspeed":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(lock, "version", version)
    assert scaling.machine()["versions"] == {
        **dict.fromkeys(("torch", "transformers", "trl", "peft", "accelerate"), "1"),
        "deepspeed": "absent",
    }
