"""run.lock.json: everything that decided a run's numbers and is not in its recipe."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft import __version__
from llama_ft.paths import PACKAGE
from llama_ft.recipe import dump
from llama_ft.recipe.schema import Recipe

if TYPE_CHECKING:
    from accelerate import PartialState

    from llama_ft.data.prepare import Prepared
    from llama_ft.train.base import Base
    from llama_ft.train.load import Loaded

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
SAMPLE = 2**20
"""Bytes at the start, the middle and the end of a file of weights that its fingerprint looks at."""


def lock_contents(
    base: Base, prepared: Prepared, loaded: Loaded, state: PartialState, micro_batch: int, accumulation: int
) -> dict[str, Any]:
    """What a run that starts now is decided by: its data, its base, how it is computed, and with what."""
    import torch

    from llama_ft.train.engine import ONE_PROCESS, engine_of

    recipe = base.recipe
    engine = engine_of(state)
    return {
        "name": recipe.name,
        "recipe": recipe_hash(recipe),
        "seed": recipe.training.seed,
        "base": recipe.model.base,
        "base_folder": str(base.folder),
        "base_hash": None if base.new else folder_fingerprint(base.folder),
        "base_digest": loaded.base_digest,
        "init": "random" if base.new else "pretrained",
        "revision": recipe.model.revision,
        "compute_dtype": str(loaded.compute_dtype).removeprefix("torch."),
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        "documents": len(prepared.mixture) if prepared.stream is None else None,
        "global_batch": recipe.training.global_batch,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "engine": engine.name or ONE_PROCESS,
        "world_size": state.num_processes,
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "hashes": prepared.hashes,
        "revisions": {source.label: source.revision for source in prepared.job.sources if source.revision},
        "data": prepared.report.as_dict(),
        "versions": versions(used_besides(recipe, engine.name)),
        "commit": commit(),
    }


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 in hex of a resolved recipe as recipe.yaml holds it."""
    return hashlib.sha256(dump(recipe).encode()).hexdigest()


def used_besides(recipe: Recipe, engine: str) -> tuple[str, ...]:
    """Packages that only some runs compute with."""
    quantised = recipe.adapter.method == "qlora" or recipe.training.optimizer.startswith(("paged", "adamw_8bit"))
    return (*(["bitsandbytes"] if quantised else []), *(["deepspeed"] if engine.startswith("ZeRO") else []))


def versions(besides: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of python, of this project and of what it computes with."""
    found = {"python": platform.python_version(), "llama_ft": __version__}
    for package in (*PACKAGES, *besides):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def commit() -> str | None:
    """The checkout's commit, with `+changes` when the tree differs from it; None outside of a checkout."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def device_name() -> str:
    """What a run computes on here: the first GPU that torch sees, or the processor, by the system's name for it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def folder_fingerprint(folder: Path) -> str:
    """A hash in hex of a model folder: its config, and of every file of weights its size and three samples of 1 MiB.

    Weights that were trained, merged or rounded differ everywhere; reading all of 140 GB would take minutes.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLE)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
