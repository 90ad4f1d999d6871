"""The line that starts a recipe's training, and what its launch config says about engine and devices."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ft.paths import find_file
from llama_ft.plan.engine import Engine
from llama_ft.plan.hardware import Hardware, usable_cores
from llama_ft.recipe.launchers import Launcher, read_launcher
from llama_ft.recipe.nodes import Findings, Source, plain
from llama_ft.recipe.yaml_reader import read_file

USUAL_PORT = 29500
"""Where processes meet if nobody says a port: accelerate's and torch's own choice."""
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
    machines: Mapping[str, int | str | bool] | None = None,
) -> list[str]:
    """The arguments of `accelerate launch … -m llama_ft.train RECIPE`, this Python and accelerate's module in front.

    processes: overrides the config's number of devices; None leaves it. machines: further options of accelerate's that
    override its config, as `{"machine_rank": 1}`; True for one without a value.
    """
    line = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    # What accelerate would otherwise guess aloud.
    line += ["--dynamo_backend", "no"]
    if use_cpu:
        line += ["--num_cpu_threads_per_process", str(usable_cores())]
    line += ["--config_file", config]
    if processes is not None:
        line += ["--num_processes", str(processes)]
    for option, value in (machines or {}).items():
        line += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    return [*line, "-m", "llama_ft.train", recipe_path, *overrides, *flags]


def meeting_options(launcher: Launcher) -> dict[str, int | str | bool]:
    """Options of `accelerate launch` by which several machines meet on one port; none for one machine.

    Said aloud, for a config of one machine says port 0: with it each machine would take a free port of its own. And
    DeepSpeed's own way to other machines is pdsh; here a launcher is started on each.
    """
    if launcher.machines == 1:
        return {}
    said: dict[str, int | str | bool] = {"main_process_port": launcher.port or USUAL_PORT}
    said |= {"same_network": True, "rdzv_backend": "static"}
    if launcher.engine.startswith(("ZeRO", "DeepSpeed")):
        said["deepspeed_multinode_launcher"] = "standard"
    return said


def torchrun_line(recipe_path: str, overrides: list[str], flags: list[str], *, launcher: Launcher) -> list[str]:
    """The same by torchrun, for what accelerate does not start: several processes of `distributed_type: MULTI_CPU`."""
    line = [sys.executable, "-m", "torch.distributed.run"]
    if launcher.machines > 1:
        line += ["--nnodes", str(launcher.machines), "--node-rank", str(launcher.machine_rank)]
        line += ["--master-addr", str(launcher.address), "--master-port", str(launcher.port or USUAL_PORT)]
    else:
        line += ["--standalone"]
    line += ["--nproc-per-node", str(launcher.processes // launcher.machines)]
    return [*line, "-m", "llama_ft.train", recipe_path, *overrides, *flags]


def shown_line(line: list[str]) -> list[str]:
    """The same as a person types it: `accelerate launch …`, `torchrun …`."""
    return [*(["torchrun"] if line[2] == "torch.distributed.run" else ["accelerate", "launch"]), *line[3:]]


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
