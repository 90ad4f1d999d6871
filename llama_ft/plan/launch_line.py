"""The `accelerate launch` line of a recipe, and what its launch config says about engine and devices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llama_ft.paths import find_file
from llama_ft.plan.engine import Engine
from llama_ft.plan.hardware import Hardware, usable_cores
from llama_ft.recipe.launchers import Launcher, read_launcher
from llama_ft.recipe.nodes import Findings, Source, plain
from llama_ft.recipe.yaml_reader import read_file

GPUS = "accelerate_configs/ddp.yaml"
"""The launch config of a plan for GPUs where the recipe names one for a CPU."""


def accelerate_line(
    recipe_path: str,
    overrides: list[str],
    flags: list[str],
    *,
    config: str,
    use_cpu: bool,
    processes: int | None = None,
) -> list[str]:
    """The arguments of `accelerate launch … -m llama_ft.train RECIPE`, this Python and accelerate's module in front.

    processes: overrides the config's number of devices; None leaves it.
    """
    line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    # What accelerate would otherwise guess aloud.
    line += ["--dynamo_backend", "no"]
    if use_cpu:
        line += ["--num_cpu_threads_per_process", str(usable_cores())]
    line += ["--config_file", config]
    if processes is not None:
        line += ["--num_processes", str(processes)]
    return [*line, "-m", "llama_ft.train", recipe_path, *overrides, *flags]


def shown_line(line: list[str]) -> list[str]:
    """The same as a person types it: `accelerate launch …`."""
    return ["accelerate", *line[3:]]


def launch_for(config: str, launcher: Launcher | None, hardware: Hardware | None) -> tuple[str, Launcher]:
    """The launch config that fits the hardware: a recipe's own, or the one for GPUs where it names one for a CPU."""
    own = launcher or Launcher(True, 1, "")
    if hardware is not None and hardware.on_gpu and own.use_cpu:
        path = find_file(GPUS)
        read = read_launcher(path) if path is not None else own
        return GPUS, read if isinstance(read, Launcher) else own
    return config, own


def engine_of(config: str, launcher: Launcher, devices: int) -> Engine:
    """The engine of a launch config on so many devices. One device alone needs no engine but ZeRO's and FSDP's own."""
    name = launcher.engine
    if devices == 1 and name == "DDP":
        name = ""
    return Engine(name, devices, _offloads(config))


def _offloads(config: str) -> bool:
    """Whether a config of DeepSpeed or FSDP sends optimizer states to main memory."""
    path = find_file(config)
    tree = read_file(path, Source(config, 0, path.parent), Findings()) if path is not None else None
    told: Any = plain(tree) if tree is not None else {}
    states = _section(told, "deepspeed_config").get("offload_optimizer_device", "none")
    return str(states) not in ("none", "None") or _section(told, "fsdp_config").get("fsdp_offload_params") is True


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def short(path: str) -> str:
    """A config as the user would name it: relative to the working directory, or to the shipped files."""
    found = Path(path)
    for parent in found.parents:
        if parent.name == "accelerate_configs" and (find_file(f"accelerate_configs/{found.name}") or "") == found:
            return f"accelerate_configs/{found.name}"
    return path
