"""A model for an engine that cuts weights up is loaded without a copy of the whole in every process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_ft.llama.shapes import PRESETS
from tests.conftest import ROOT
from tests.train.conftest import ENVIRONMENT

WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 16}
"""Half a gigabyte in float32, of which no tensor is more than a thirtieth."""


@pytest.fixture(scope="module")
def wide_base(tiny_base, tmp_path_factory) -> Path:
    """The tiny base's tokenizer on a model whose memory shows."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig.from_pretrained(tiny_base)
    config.update(WIDE | {"num_key_value_heads": 16, "head_dim": 64})
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


def peaks(engine: str, small: Path, base: Path) -> list[float]:
    """Of each rank, the memory that loading took at most, as a share of all weights."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "tests.train.load_worker", engine, str(small), str(base)]
    # Of the memory that is given back: glibc would keep blocks of this size, and the mark would show its holes as well.
    environment = ENVIRONMENT | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = next(line for line in done.stdout.splitlines() if line.startswith("shares: "))
    return [float(share) for share in said.split()[1:]]


def test_under_zero3_every_process_holds_its_part(tiny_base, wide_base):
    shares = peaks("ZeRO-3", tiny_base, wide_base)
    assert len(shares) == 2 and max(shares) < 0.7, shares


def test_under_fsdp2_only_the_main_process_reads(tiny_base, wide_base):
    assert peaks("FSDP2", tiny_base, wide_base)[1] < 0.1


def test_a_process_that_waits_for_llama_3_70b_holds_nothing():
    """141 GB in bfloat16, in a process of its own: what was held before does not count."""
    code = (
        "import psutil, torch\n"
        "from transformers import LlamaConfig\n"
        "from llama_ft.llama.shapes import PRESETS\n"
        "from llama_ft.train.sharding.cut import hollow_model\n"
        "config = LlamaConfig(**PRESETS['llama-3-70b'].config_dict())\n"
        "before = psutil.Process().memory_info().rss\n"
        "model = hollow_model(config, torch.bfloat16)\n"
        "size = sum(p.numel() * p.element_size() for p in model.parameters())\n"
        "print(size, psutil.Process().memory_info().rss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    size, held = map(int, done.stdout.split())
    assert size == 2 * PRESETS["llama-3-70b"].parameters > 140e9
    assert held < 500 * 2**20
