"""Loss head and fused products on weights that an engine has cut up: real processes, two of them.

FSDP2 runs in CI (torch's own fully_shard over gloo); ZeRO-3 needs deepspeed and half a minute per case.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT

KINDS = ["full", "tied", "lora", "pair"]


def run(engine: str, kind: str) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "tests.llama.sharded_worker", engine, kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal: " in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2_gives_the_gradients_of_the_whole_model(kind):
    run("fsdp2", kind)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed")
@pytest.mark.parametrize("kind", KINDS)
def test_zero3_gives_the_gradients_of_the_whole_model(kind):
    run("zero3", kind)
