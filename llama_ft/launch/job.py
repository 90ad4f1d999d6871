"""One job: a recipe on so many nodes with so many processes each, its plan there, and its launch config."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.launch.needs import CORES_PER_GPU
from llama_ft.plan.commands import hardware_of
from llama_ft.plan.data import data_facts
from llama_ft.plan.hardware import Hardware, parse_hardware, this_cpu, usable_cores
from llama_ft.plan.launch_line import engine_of, launch_for, short
from llama_ft.plan.plan import Plan, make_plan
from llama_ft.plan.shape import known_shape
from llama_ft.recipe.launchers import Launcher
from llama_ft.recipe.load import resolve


@dataclass(frozen=True)
class Job:
    """What every scheduler's file is filled from.

    `config`: the launch config as each node looks it up; `per_node`: processes of a node, a GPU each unless on a CPU;
    `cores`: of a node. `notes`: sentences for the user that belong to no scheduler in particular.
    """

    recipe_path: str
    overrides: tuple[str, ...]
    config: str
    launcher: Launcher
    nodes: int
    per_node: int
    cores: int
    plan: Plan
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.plan.recipe.name

    @property
    def processes(self) -> int:
        """Of all nodes."""
        return self.nodes * self.per_node

    @property
    def on_gpu(self) -> bool:
        """Whether the job gets GPUs."""
        return self.plan.hardware.on_gpu

    @property
    def engine(self) -> str:
        """As llama_ft.recipe.launchers names it; plain processes of a GPU config are DDP."""
        return self.launcher.engine

    @property
    def deepspeed(self) -> bool:
        """Whether accelerate starts DeepSpeed."""
        return self.engine.startswith(("ZeRO", "DeepSpeed"))

    @property
    def card(self) -> str | None:
        """The card's name in llama_ft.plan.hardware, where one was named."""
        return self.plan.hardware.card.name if self.plan.hardware.card is not None else None

    @property
    def run_dir(self) -> str:
        """The run folder, relative to the job's working directory unless the recipe names an absolute one."""
        return self.plan.recipe.run_dir


def make_job(
    recipe_path: str,
    overrides: list[str],
    *,
    nodes: int | None = None,
    gpus: int | None = None,
    hardware: str | None = None,
) -> Job:
    """Resolves and plans a recipe for `nodes` nodes, None for as many as the launch config has machines.

    gpus: of each node; hardware: the card of each, a count before it is a node's too. With neither, a launch config for
    GPUs says how many, and one for a CPU gets none. Raises UserError for whatever the recipe, the plan or the launch
    config does not allow.
    """
    resolved = resolve(recipe_path, overrides)
    recipe = resolved.recipe
    of_node = _of_node(gpus, hardware)
    config, launcher = launch_for(recipe.launch, resolved.launcher, of_node)
    if launcher.torchrun:
        raise UserError(
            f"{Path(config).name} is of distributed_type MULTI_CPU, of which accelerate starts one process on a node",
            key="launch",
            hint="launch=accelerate_configs/cpu_ddp_2.yaml, or one like it",
        )
    nodes = launcher.machines if nodes is None else nodes
    notes = []
    if resolved.launcher is not None and resolved.launcher.use_cpu and not launcher.use_cpu:
        notes.append(f"the recipe's launch config is for a CPU: {config} takes its place, for GPUs")
    if of_node is not None and not of_node.on_gpu and not launcher.use_cpu:
        hint = "launch=accelerate_configs/cpu.yaml, or cpu_ddp_2.yaml on two nodes"
        raise UserError(f"{Path(config).name} is for GPUs", key="--hardware", hint=hint)
    per_node = of_node.devices if of_node is not None and of_node.on_gpu else _split(launcher, nodes)
    processes = nodes * per_node
    if processes > 1 and not launcher.engine:
        other = "cpu_ddp_2" if launcher.use_cpu else "ddp"
        raise UserError(
            f"{Path(config).name} starts one process, and this job has {processes}",
            key="launch",
            hint=f"launch=accelerate_configs/{other}.yaml, or one node" + ("" if launcher.use_cpu else " with one GPU"),
        )
    if launcher.use_cpu:
        notes.append("the launch config is for a CPU: this job gets no GPUs (--gpus N asks for them)")
        notes.append("the time was estimated for this machine's CPU: nodes of another kind take another time")
    target = _all_of(of_node or (this_cpu() if launcher.use_cpu else hardware_of(launcher)), processes)
    plan = make_plan(
        recipe, known_shape(recipe.model), data_facts(recipe), target, engine_of(config, launcher, processes)
    )
    if plan.fit.largest == 0:
        notes.append(f"the plan says that nothing fits on {plan.hardware.name}: see llama-ft plan")
    if plan.seconds is None:
        why = (
            "name the card, --hardware H100-80GB"
            if target.on_gpu and target.card is None
            else "its steps are not known"
        )
        notes.append(f"no time limit was written, for the plan knows no time: {why}")
    cores = CORES_PER_GPU * per_node if target.on_gpu else usable_cores()
    return Job(recipe_path, tuple(overrides), _portable(config), launcher, nodes, per_node, cores, plan, tuple(notes))


def _of_node(gpus: int | None, hardware: str | None) -> Hardware | None:
    """One node's devices as the command line names them, None where it says nothing."""
    if hardware is None:
        return None if gpus is None else Hardware(f"{gpus} GPUs that are not named", gpus, None)
    named = parse_hardware(hardware)
    if gpus is None:
        return named
    if not named.on_gpu:
        raise UserError("a CPU has no GPUs", key="--gpus", hint="leave --gpus out, or name a card with --hardware")
    if named.devices not in (1, gpus):
        what = f"--hardware says {named.devices} GPUs a node and --gpus {gpus}"
        raise UserError(what, key="--gpus", hint="leave one of them out")
    return replace(named, devices=gpus)


def _all_of(one: Hardware, devices: int) -> Hardware:
    """The devices of all nodes: what the plan is made for."""
    if not one.on_gpu or one.card is None:
        name = one.name if one.on_gpu or devices == 1 else f"{devices} of {one.name}"
        return replace(
            one, name=name if one.memory is not None else f"{devices} GPUs that are not named", devices=devices
        )
    return replace(one, name=f"{devices}x{one.card.name}" if devices > 1 else one.card.name, devices=devices)


def _split(launcher: Launcher, nodes: int) -> int:
    """A node's share of the processes that the launch config asks for."""
    share, rest = divmod(launcher.processes, nodes)
    if share and not rest:
        return share
    if launcher.processes == 1:
        return 1
    raise UserError(
        f"the launch config asks for {launcher.processes} processes, which {nodes} nodes cannot share evenly",
        key="launch",
        hint="say how many GPUs each node has: --gpus N" if not launcher.use_cpu else "take another number of nodes",
    )


def _portable(config: str) -> str:
    """A launch config as another machine finds it: a shipped one's name, else relative to the working directory."""
    path = Path(short(config))
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)
