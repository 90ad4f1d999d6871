"""What a launch config (accelerate's YAML) says about the machine, as far as a recipe needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.errors import Problem
from llama_ft.recipe.nodes import Findings, Source, plain
from llama_ft.recipe.yaml_reader import read_file

PARALLEL = ("tp_size", "cp_size", "sp_size", "dp_replicate_size")
"""Of accelerate's parallelism_config: how many processes share one sequence or one weight in other ways than FSDP2."""
NOT_PARALLEL = (
    "tensor, context and sequence parallelism and replicated shards are not supported: the libraries cut attention "
    "through hooks of transformers' own attention, and the one here keeps documents of a pack apart"
)
NOT_PARALLEL_HINT = "long documents: training.gradient_checkpointing: true and fsdp2.yaml on more GPUs"


@dataclass(frozen=True)
class Launcher:
    """The machines a launch config asks for. `processes` counts devices over all machines.

    address and port: where the processes of several machines meet, None where the config leaves it to who starts it;
    torchrun: accelerate would start one process of several, and torchrun starts them.
    """

    use_cpu: bool
    processes: int
    engine: str
    machines: int = 1
    machine_rank: int = 0
    address: str | None = None
    port: int | None = None
    torchrun: bool = False

    @property
    def hardware(self) -> str:
        """In words for a list: `CPU`, `1 GPU`, `4 GPUs, FSDP2`."""
        device = "CPU" if self.use_cpu else "GPU" if self.processes == 1 else "GPUs"
        count = device if self.use_cpu and self.processes == 1 else f"{self.processes} {device}"
        return f"{count}, {self.engine}" if self.engine else count


def read_launcher(path: Path) -> Launcher | list[Problem]:
    """The launch config at `path`, or what is wrong with the file. accelerate itself checks the rest of its keys."""
    findings = Findings()
    tree = read_file(path, Source(str(path), 0, path.parent), findings)
    if tree is None or findings.found:
        return findings.problems()
    config = plain(tree)
    kind = config.get("distributed_type")
    if not isinstance(kind, str):
        hint = "see accelerate_configs/cpu.yaml, or let `accelerate config` write one"
        return [Problem("is no launch config: distributed_type is missing", f"{path}:1:1", "distributed_type", hint)]
    parallel = config.get("parallelism_config")
    for key, size in parallel.items() if isinstance(parallel, dict) else ():
        if str(key).endswith(PARALLEL) and isinstance(size, int) and size > 1:
            return [Problem(f"{key} is {size}: {NOT_PARALLEL}", f"{path}:1:1", "parallelism_config", NOT_PARALLEL_HINT)]
    processes = config.get("num_processes", 1)
    count = processes if isinstance(processes, int) and processes > 0 else 1
    address = config.get("main_process_ip")
    return Launcher(
        use_cpu=config.get("use_cpu") is True,
        processes=count,
        engine=_engine(kind, config),
        machines=_number(config, "num_machines", 1) or 1,
        machine_rank=_number(config, "machine_rank", 0),
        address=str(address) if address else None,
        port=_number(config, "main_process_port", 0) or None,
        torchrun=kind == "MULTI_CPU" and count > 1,
    )


def _number(config: dict[str, Any], name: str, otherwise: int) -> int:
    value = config.get(name)
    return value if isinstance(value, int) and value >= 0 else otherwise


def _engine(kind: str, config: dict[str, Any]) -> str:
    def section(name: str) -> dict[str, Any]:
        value = config.get(name)
        return value if isinstance(value, dict) else {}

    if kind == "FSDP":
        return "FSDP2" if section("fsdp_config").get("fsdp_version") == 2 else "FSDP"
    if kind == "DEEPSPEED":
        stage = section("deepspeed_config").get("zero_stage")
        return f"ZeRO-{stage}" if stage is not None else "DeepSpeed"
    return {"NO": "", "MULTI_GPU": "DDP", "MULTI_CPU": "DDP"}.get(kind, kind)
