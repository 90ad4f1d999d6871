"""One rank of tests/train/test_cut.py: what a process holds while a model is loaded for an engine that cuts weights up.

torchrun --nproc_per_node 2 -m tests.train.load_worker {FSDP2|ZeRO-3} SMALL BASE   prints `shares: …` of all weights
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from llama_ft import load_recipe
from llama_ft.recipe.run import Run
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.train.base import open_base
from llama_ft.train.engine import Engine
from llama_ft.train.load import load_for_training
from llama_ft.train.planned import high_water


def main() -> None:
    """Loads a small base first, for what is imported on the way, then the one that is measured."""
    name, small, path = sys.argv[1:]
    state = PartialState(cpu=True)
    load(name, small, state)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew (man 5 proc)
    before = psutil.Process().memory_info().rss
    whole, model = load(name, path, state)
    shares: list[float] = gather_object([(high_water() - before) / whole])
    if state.is_main_process:
        print(f"shares: {' '.join(map(str, shares))}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    del model


def load(name: str, path: str, state: PartialState) -> tuple[int, object]:
    """(bytes of all weights, the model)."""
    recipe = load_recipe("quickstart", [f"model.base={path}", "model.dtype=float32", "adapter.method=full"])
    base = open_base(recipe, Run("nowhere"), load_tokenizer(path))
    return 4 * base.parameters, load_for_training(base, state.device, "float32", Engine(name, 2)).model


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
