"""A run's plan, made at its start with what is known by then, and what the run took, for the two to be compared."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llama_ft.data.prepare import Prepared
from llama_ft.files import write_json
from llama_ft.llama.shapes import Shape
from llama_ft.plan.data import data_facts, facts_of
from llama_ft.plan.engine import Engine
from llama_ft.plan.hardware import Hardware, these_gpus, this_cpu
from llama_ft.plan.plan import Plan, make_plan
from llama_ft.plan.probe import measure, spec
from llama_ft.plan.shape import Known, stored_type
from llama_ft.recipe.run import Run
from llama_ft.train.base import Base
from llama_ft.train.engine import engine_of
from llama_ft.train.resume import cut_in_force

MEASURED = "measured.json"
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")
"""What the command line of a process that starts trainers holds."""


def plan_of_run(
    base: Base, prepared: Prepared, state: PartialState, micro_batch: int | None = None, dtype: str | None = None
) -> Plan:
    """The plan of a run on the machine it has come to: its own devices, and rates measured in this process (a second).

    micro_batch: in place of the recipe's. dtype: the type a resumed run computes in; None where it is chosen later. The
    main process's plan is that of all, for what each finds free differs.
    """
    recipe = base.recipe
    if micro_batch is not None:
        training = recipe.training.model_copy(update={"micro_batch": micro_batch})
        recipe = recipe.model_copy(update={"training": training})
    shape = Shape.of_config(base.config.to_dict())  # its own vocabulary: the plan sees by it that tokens were added
    known = Known(shape, "the run's base", None if base.new else stored_type(base.folder))
    facts = facts_of(prepared) if prepared.stream is None else data_facts(recipe)
    running = engine_of(state)
    engine = Engine(running.name, running.processes, offloads())
    on_cpu = state.device.type == "cpu"
    rates = measure(spec(shape, recipe.model.dtype)) if on_cpu else None
    hardware = cpu_of_run(state) if on_cpu else gpu_of_run(state)
    plan = make_plan(recipe, known, facts, hardware, engine, rates=rates, dtype=dtype)
    return broadcast_object_list([plan])[0]


def offloads() -> bool:
    """Whether the launcher asks for states, or all, in main memory, by the variables that accelerate sets for a run."""
    states = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and states != "none"
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("FSDP_OFFLOAD_PARAMS") == "true"
    return deepspeed or fsdp


def cut_of_run(planned: Plan, lock: dict[str, Any], state: PartialState, *, kept: bool) -> tuple[int, int]:
    """Micro-batch and accumulation: those of a run that goes on with as many processes, for `auto` was resolved once,
    else the plan's. kept: whether the recipe asks for what it asked for then."""
    began = cut_in_force(lock)
    if kept and began["world_size"] == state.num_processes:
        return began["micro_batch"], began["accumulation"]
    return planned.cut.micro_batch, planned.cut.accumulation


def cpu_of_run(state: PartialState) -> Hardware:
    """This process's share of the main memory that is free, what it holds itself included."""
    here = this_cpu()
    free = (here.memory or 0) // state.num_processes + psutil.Process().memory_info().rss
    return Hardware(here.name, state.num_processes, free, None, on_gpu=False)


def gpu_of_run(state: PartialState) -> Hardware:
    """This process's GPU; its rate where the card is known."""
    found = these_gpus()
    memory = torch.cuda.get_device_properties(state.device).total_memory
    name = torch.cuda.get_device_name(state.device)
    return Hardware(name, state.num_processes, memory, found.card if found is not None else None)


def write_measured(run: Run, state: PartialState, steps: int, training_peak: int) -> None:
    """Writes what the run took, under the keys of the plan in its lock: peak_bytes, seconds, steps, tokens.

    `peak_bytes` is one process's: on a CPU the most that was ever resident, on a GPU the most that its allocator took;
    `training_peak_bytes` is what it was before the export. `seconds` count from the command. After a resume, those are
    of the part since then. Tokens are of all processes.
    """
    tokens, training, evaluation = 0, 0.0, 0.0
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        tokens = record.get("tokens", tokens)
        training += record.get("seconds", 0.0)
        evaluation += record.get("eval_seconds", 0.0)
    measured: dict[str, Any] = {
        "peak_bytes": peak_bytes(state.device),
        "training_peak_bytes": training_peak,
        "seconds": round(time.time() - began(), 1),
        "training_seconds": round(training, 1),
        "evaluation_seconds": round(evaluation, 1),
        "steps": steps,
        "tokens": tokens,
    }
    write_json(run.path / MEASURED, measured)


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held so far; see :func:`write_measured`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return high_water()


def high_water() -> int:
    """The most bytes this process ever had resident.

    Linux keeps the mark in VmHWM. Elsewhere rusage has it, which may count what the parent held when it forked.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def began() -> float:
    """When the command started, in seconds of the epoch: this process, or the launcher that started it."""
    process = psutil.Process()
    start = process.create_time()
    for parent in process.parents():
        try:
            if not any(word in " ".join(parent.cmdline()) for word in LAUNCHERS):
                break
            start = parent.create_time()
        except psutil.Error:
            break
    return start
