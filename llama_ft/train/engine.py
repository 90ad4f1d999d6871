"""The engine in force: what spreads a run over processes, checked against what was asked, and told at its start.

accelerate falls back without a word. On a machine without a GPU a config of FSDP trains by plain DDP, one of several
CPU processes trains with a single one, and a precision in the launch config multiplies in another type than the recipe
says. Such a run gives other numbers than it was started for, or takes more memory than was planned.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.state import DistributedType
from rich.console import Console

from llama_ft.errors import Problem, UserError
from llama_ft.recipe.engines import unfit
from llama_ft.recipe.launchers import NOT_PARALLEL, NOT_PARALLEL_HINT, PARALLEL, Launcher, read_launcher
from llama_ft.recipe.schema import Recipe
from llama_ft.train.launch import ASKED

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}
"""accelerate's names of autocast's types."""


ONE_PROCESS = "one process"
"""What run.lock.json calls a run without an engine."""


@dataclass(frozen=True)
class Engine:
    """Who spreads the work: `""` (one process), `DDP`, `FSDP`, `FSDP2`, `ZeRO-1` … `ZeRO-3`; on how many processes."""

    name: str
    processes: int
    backend: str | None = None

    @property
    def cuts_weights(self) -> bool:
        """Whether no process has the weights whole."""
        return self.name.startswith("FSDP") or self.name == "ZeRO-3"

    def __str__(self) -> str:
        count = ONE_PROCESS if self.processes == 1 else f"{self.processes} processes"
        whole = f"{self.name} on {count}" if self.name else count
        return f"{whole} ({self.backend})" if self.backend else whole


def asked_engine() -> Engine | None:
    """What the launcher was asked for, as far as its environment says; None where nothing was said.

    accelerate's own variables come first: its command line may have overruled the config.
    """
    said = json.loads(os.environ.get(ASKED, "{}"))
    name = said.get("engine")
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")  # absent where DeepSpeed has a config of its own
        name = f"ZeRO-{stage}" if stage else "DeepSpeed"
    elif _flag("ACCELERATE_USE_FSDP"):
        name = "FSDP2" if os.environ.get("FSDP_VERSION") == "2" else "FSDP"
    processes = said.get("processes") or int(os.environ.get("WORLD_SIZE", "0"))
    if name is None and not processes:
        return None
    processes = processes or 1
    return Engine(name or ("DDP" if processes > 1 else ""), processes)


def check_launch() -> None:
    """Refuses a launch that dropped the processes it was asked for, before anything else is done.

    accelerate's simple launcher names a rendezvous address but no world size when it drops the other processes that
    its config asked for: on a CPU `distributed_type: MULTI_CPU` with two processes trains with one, without a word.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "the launcher was asked for several processes and started one",
            key="launch",
            hint="on a CPU use accelerate_configs/cpu.yaml, or start the processes with torchrun",
        )
    for name in PARALLEL:
        size = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
        if size != "1":
            raise UserError(f"{name} is {size}: {NOT_PARALLEL}", key="launch", hint=NOT_PARALLEL_HINT)


def check_engine(found: Engine) -> None:
    """Refuses an engine, or a number of processes, that is not what was asked for."""
    asked = asked_engine()
    if asked is None:
        return
    if asked.processes != found.processes:
        raise UserError(
            f"the launcher was asked for {asked.processes} processes and {found.processes} are in force",
            key="launch",
            hint="on a CPU use accelerate_configs/cpu.yaml, or start the processes with torchrun",
        )
    # A DeepSpeed config of its own names no stage in the environment.
    same = found.name.startswith("ZeRO") if asked.name == "DeepSpeed" else asked.name == found.name
    if not same and not (asked.name == "DDP" and found.processes == 1):
        on_gpu = asked.name.startswith("FSDP") and not torch.cuda.is_available()
        alone = ", which accelerate has on GPUs alone; torch sees none here" if on_gpu else ""
        raise UserError(
            f"the launcher was asked for {asked.name or 'one process'}{alone}: {found} is in force",
            key="launch",
            hint="take a launch config for what this machine has: accelerate_configs/cpu.yaml without a GPU, ddp.yaml",
        )


def check_recipe_fits(recipe: Recipe, engine: Engine, *, new_tokens: bool) -> None:
    """Refuses what the engine cannot train: the launcher's engine may be another than the one of the recipe's `launch`.

    new_tokens: tokens were added, so that embedding and head are trained beside an adapter.
    """
    adapter, optimizer = recipe.adapter, recipe.training.optimizer
    whole = adapter.method != "full" and (new_tokens or bool(adapter.modules_to_save))
    found = unfit(
        engine.name,
        method=adapter.method,
        optimizer=optimizer,
        dora=adapter.dora,
        whole_modules=whole,
        objective=recipe.training.objective,
        reference=recipe.preference.reference,
    )
    if found:
        raise UserError(Problem(what, None, key, hint) for key, what, hint in found)


def engine_of(state: PartialState) -> Engine:
    """What will be in force, from the processes alone: accelerate settles on it only as the trainer is made."""
    kind = state.distributed_type
    if kind == DistributedType.NO:
        return Engine("", state.num_processes)
    # On a CPU the processes are first known as such, and DeepSpeed takes them over when the trainer is made.
    if kind == DistributedType.DEEPSPEED or (_flag("ACCELERATE_USE_DEEPSPEED") and not _flag("ACCELERATE_USE_CPU")):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return Engine(f"ZeRO-{stage}" if stage else "ZeRO", state.num_processes, state.backend)
    version = os.environ.get("FSDP_VERSION")
    # On CPUs version 2 alone: llama_ft.train.sharding.on_cpus.
    if kind == DistributedType.FSDP or (
        _flag("ACCELERATE_USE_FSDP") and (kind != DistributedType.MULTI_CPU or version == "2")
    ):
        return Engine("FSDP2" if version == "2" else "FSDP", state.num_processes, state.backend)
    return Engine("DDP", state.num_processes, state.backend)


def engine_in_force(accelerator: Any) -> Engine:
    """What is in force, from the accelerator that the trainer works with."""
    kind, processes = accelerator.distributed_type, accelerator.num_processes
    if kind == DistributedType.NO:
        return Engine("", processes)
    if kind == DistributedType.DEEPSPEED:
        name = f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    elif kind == DistributedType.FSDP:
        name = "FSDP2" if accelerator.is_fsdp2 else "FSDP"
    else:
        name = "DDP"
    return Engine(name, processes, accelerator.state.backend)


def contradictions(recipe: Recipe, device: torch.device) -> list[tuple[str, str]]:
    """What the launcher was asked for and this machine or the recipe does not have: (name, sentence) of each."""
    found = []
    if device.type == "cpu" and asks_for_gpus():
        found.append(("no-gpu", "the launch config asks for a GPU and torch sees none here: this trains on the CPU"))
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    computed = PRECISIONS.get(precision, precision)
    if precision != "no" and computed != recipe.model.dtype:
        said_by = f"the launch config says mixed_precision: {precision}, the recipe model.dtype: {recipe.model.dtype}"
        way_out = "mixed_precision: 'no' leaves the type to the recipe"
        found.append(("precision", f"{said_by}: products are computed in {computed}; {way_out}"))
    return found


def asks_for_gpus() -> bool:
    """Whether the launch config says `use_cpu: false`: as `llama-ft train` passes it on, else as accelerate's launcher,
    the process above this one, was given it. Its environment does not tell.
    """
    said = json.loads(os.environ.get(ASKED, "{}"))
    if said:
        return not said["use_cpu"]
    parent = psutil.Process().parent()
    line = parent.cmdline() if parent is not None else []
    if "--config_file" not in line[:-1]:
        return False
    launcher = read_launcher(Path(line[line.index("--config_file") + 1]))
    return isinstance(launcher, Launcher) and not launcher.use_cpu


def in_force_line(engine: Engine, compute_dtype: torch.dtype, accelerator: Any) -> str:
    """`engine: DDP on 2 processes (gloo), float32 on cpu`, with autocast's type where products are not in that one."""
    precision = accelerator.mixed_precision
    autocast = f", products in {PRECISIONS.get(precision, precision)}" if precision != "no" else ""
    dtype = str(compute_dtype).removeprefix("torch.")
    return f"engine: {engine}, {dtype} on {accelerator.device.type}{autocast}"


def settle_engine(
    accelerator: Any, recipe: Recipe, compute_dtype: torch.dtype, console: Console, warn: Callable[[str, str], None]
) -> None:
    """Once the trainer is made: the engine in force is what was asked, or UserError; the main process says which it is.

    warn(name, sentence) takes what this machine or the recipe does not have of what was asked.
    """
    engine = engine_in_force(accelerator)
    check_engine(engine)
    console.print(in_force_line(engine, compute_dtype, accelerator), highlight=False, soft_wrap=True)
    if accelerator.is_main_process:
        for name, sentence in contradictions(recipe, accelerator.device):
            warn(name, sentence)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
