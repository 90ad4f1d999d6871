"""A job's file: a Jinja template, filled from the job and its plan."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llama_ft import __version__
from llama_ft.errors import UserError, did_you_mean
from llama_ft.launch.job import Job
from llama_ft.launch.needs import grace, memory_gib, slurm_time, time_limit
from llama_ft.plan.show import plan_lines

TEMPLATES = Path(__file__).resolve().parent / "templates"
RESTARTS = 10
"""How often a stopped job goes on by itself. Our choice: a busy night, and an end to one that gets nowhere."""
RESTARTS_ON_ERRORS = 3
"""SkyPilot: restarts after an error that may be the machine's."""
SKYPILOT_NAMES = {
    "RTX-3090": "RTX3090",
    "RTX-4090": "RTX4090",
    "RTX-5090": "RTX5090",
    "A10G-24GB": "A10G",
    "L4-24GB": "L4",
    "L40S-48GB": "L40S",
    "A100-40GB": "A100",
    "A100-80GB": "A100-80GB",
    "H100-80GB": "H100",
    "H200-141GB": "H200",
    "B200-180GB": "B200",
}
"""Cards of llama_ft.plan.hardware as SkyPilot's catalogs call them."""
BUCKET = re.compile(r"[a-z0-9]+://\S+")


@dataclass(frozen=True)
class Scheduler:
    """Its template, the ending of the file, the shared folder in a job (None: where the job was submitted), the command
    that takes the file, with what to install for it, and which of --storage and --image its file has a place for."""

    template: str
    suffix: str
    shared: str | None
    submit: tuple[str, ...]
    install: str
    takes: tuple[str, ...] = ()


SCHEDULERS = {
    "slurm": Scheduler("slurm.sh", ".sbatch", None, ("sbatch",), "submit from a login node of the cluster"),
    "skypilot": Scheduler(
        "skypilot.yaml",
        ".sky.yaml",
        "/shared",
        ("sky", "jobs", "launch", "--yes"),
        "pip install 'skypilot[CLOUD]'",
        ("--storage",),
    ),
    "kubernetes": Scheduler(
        "kubernetes.yaml",
        ".trainjob.yaml",
        "/shared",
        ("kubectl", "create", "-f"),
        "install Kubernetes' kubectl",
        ("--storage", "--image"),
    ),
}
"""What `--on` takes."""


@dataclass(frozen=True)
class Filled:
    """A job's file, and sentences about what it leaves to the user."""

    text: str
    notes: tuple[str, ...]


def scheduler_of(name: str) -> Scheduler:
    """The scheduler of a name; UserError with the nearest one."""
    if name not in SCHEDULERS:
        raise UserError(
            f"no such scheduler '{name}'", key="--on", hint=did_you_mean(name, SCHEDULERS, kind="schedulers")
        )
    return SCHEDULERS[name]


def fill(job: Job, on: str, *, command: str, bin_folder: str, storage: str, image: str) -> Filled:
    """The file of one scheduler.

    command: what wrote it, for its head; bin_folder: the environment's commands, for Slurm; storage: a volume, a claim
    or a bucket's address; image: with llama_ft inside, for Kubernetes. Raises UserError where the scheduler needs to be
    told more.
    """
    scheduler = scheduler_of(on)
    bucket = BUCKET.fullmatch(storage) is not None
    if bucket and on != "skypilot":
        raise UserError(f"{storage} is a bucket", key="--storage", hint="name a volume claim that all pods may write")
    if bucket and job.nodes > 1:
        what = "every node writes into a checkpoint, and a bucket shows its files to the others late"
        raise UserError(what, key="--storage", hint="name a volume (sky volumes apply), or take one node")
    run_dir = job.run_dir
    if scheduler.shared is not None:
        check_shared(run_dir, scheduler.shared)
    arguments = [job.recipe_path, *job.overrides]
    if on == "skypilot" and not Path(run_dir).is_absolute():
        run_dir = f"{scheduler.shared}/{run_dir}"
        arguments.append(f"output_dir={run_dir}")
    values = _values(job) | {
        "arguments": arguments,
        "run_dir": run_dir,
        "bin": bin_folder,
        "shared": scheduler.shared,
        "storage": storage,
        "bucket": bucket,
        "image": image,
        "job_name": _dns_label(job.name),
        "accelerators": _accelerators(job) if on == "skypilot" else None,
        "comments": _comments(job, command, where=_where(on, run_dir, storage)),
    }
    text = _environment().get_template(f"{scheduler.template}.jinja").render(values)
    return Filled(text, (*job.notes, *_left_to_you(job, on, storage, image)))


def check_shared(run_dir: str, shared: str) -> None:
    """UserError for a run folder that would lie on a node's own disk, and be gone with it."""
    folder = PurePosixPath(posixpath.normpath(posixpath.join(shared, run_dir)))
    if PurePosixPath(shared) not in folder.parents:
        raise UserError(
            f"{run_dir} would not lie on the storage that all nodes share, which is {shared}",
            key="output_dir",
            hint=f"output_dir={shared}/… or a relative one, which is taken from there",
        )


def _environment() -> Environment:
    # Files for shells and YAML: nothing here is HTML.
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    found.filters |= {"sh": shlex.quote, "slurm_time": slurm_time, "tojson": _json}
    return found


def _json(value: Any) -> str:
    """A scalar that YAML reads as it is; Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=False)


def _values(job: Job) -> dict[str, Any]:
    recipe = job.plan.recipe
    extras = ["deepspeed"] if job.engine.startswith(("ZeRO", "DeepSpeed")) else []
    extras += ["qlora"] if recipe.adapter.method == "qlora" else []
    asked = {"engine": job.engine, "processes": job.processes, "use_cpu": job.launcher.use_cpu}
    return {
        "name": job.name,
        "nodes": job.nodes,
        "per_node": job.per_node,
        "processes": job.processes,
        "cores": job.cores,
        "on_gpu": job.on_gpu,
        "engine": job.engine,
        "deepspeed": job.deepspeed,
        "config": job.config,
        "asked": json.dumps(asked),
        "limit": time_limit(job.plan),
        "grace": grace(job.plan),
        "memory": memory_gib(job.plan, job.per_node),
        "restarts": RESTARTS,
        "restarts_on_errors": RESTARTS_ON_ERRORS,
        "extras": ",".join(extras),
        "version": __version__,
    }


def _accelerators(job: Job) -> str | None:
    if not job.on_gpu:
        return None
    if job.card is None:
        raise UserError(
            "SkyPilot finds machines by their card, and none is named",
            key="--hardware",
            hint="e.g. --hardware H100-80GB",
        )
    return f"{SKYPILOT_NAMES[job.card]}:{job.per_node}"


def _dns_label(name: str) -> str:
    """A name that Kubernetes takes, short enough for the names of pods that grow from it."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].rstrip("-")
    return label if label[:1].isalpha() else f"run-{label}"


def _comments(job: Job, command: str, *, where: str) -> str:
    """The head of the file: what wrote it, where the run will lie, the plan."""
    lines = [f"Written by: {command}", where, ""]
    lines += [f"{head:10}{text}" for head, text in plan_lines(job.plan, [], None) if head != "launch"]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _where(on: str, run_dir: str, storage: str) -> str:
    if on == "slurm":
        return (
            f"The run: {run_dir}, in the folder this is submitted from. That folder must lie on a disk all nodes share."
        )
    kind = "the claim" if on == "kubernetes" else "the bucket" if BUCKET.fullmatch(storage) else "the volume"
    return f"The run: {run_dir}, on {kind} {storage}, which all nodes share."


def _left_to_you(job: Job, on: str, storage: str, image: str) -> list[str]:
    """What no template can know."""
    local = Path(job.recipe_path).suffix in (".yaml", ".yml")
    if on == "slurm":
        return [f"on you: submit it from a folder on a shared disk, where {job.recipe_path} and its rows are found"]
    if on == "kubernetes":
        found = [
            f"on you: Kubeflow Trainer in the cluster, an image {image} with llama_ft in it (--image), "
            f"and a claim {storage} that {'all pods may write' if job.nodes > 1 else 'a pod may write'} (--storage)"
        ]
        if local:
            found.append(f"on you: {job.recipe_path} and the rows it names lie on that claim under the same names")
        return found
    kind = "the bucket" if BUCKET.fullmatch(storage) else "the volume"
    found = [f"on you: {kind} {storage} (--storage)"]
    if time_limit(job.plan) is not None:
        found.append("SkyPilot knows no time limit: what runs too long is ended by sky jobs cancel")
    if local and (Path(job.recipe_path).is_absolute() or ".." in Path(job.recipe_path).parts):
        found.append(f"on you: {job.recipe_path} lies outside of this folder, which alone is sent along")
    return found
