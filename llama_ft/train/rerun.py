"""`llama-ft rerun`: trains what a run.lock.json records once more, and says what is no longer the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_ft.data.prepare import prepare_data
from llama_ft.errors import Problem, UserError
from llama_ft.llama.base import locate_base
from llama_ft.recipe import load_recipe, resolve
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.launch import launch
from llama_ft.train.lock import commit, device_name, folder_fingerprint, recipe_hash, versions
from llama_ft.train.resume import cut_in_force

CHANGED_DATA = "changed-data"
"""Name by which rows, a template, a tokenizer or a base with other contents are accepted."""
HOW = ("engine", "world_size", "micro_batch", "threads", "compute_dtype", "mixed_precision")
"""Keys of the two locks that say how the same steps were computed; known of the second run when it is there."""


@dataclass(frozen=True)
class Agreement:
    """Two curves side by side: in how many steps both have a loss, and how far these lie apart at most, in nats."""

    steps: int
    apart: float
    held_out: int
    held_out_apart: float

    def __str__(self) -> str:
        def said(count: int, apart: float, of: str) -> str:
            return f"{of} of {count}: " + ("equal to the last bit" if apart == 0 else f"max |Δ loss| {apart:.3g}")

        parts = [said(self.steps, self.apart, "steps")] if self.steps else ["no step in common"]
        parts += [said(self.held_out, self.held_out_apart, "evaluations")] if self.held_out else []
        return "; ".join(parts)


def open_lock(path: Path) -> Run:
    """The run whose lock (or folder) is named, with a recipe that is still the one it was trained with."""
    run = Run((path if path.is_dir() else path.parent).resolve())
    if not run.lock_file.is_file() or not run.recipe_file.is_file():
        missing = run.lock_file.name if not run.lock_file.is_file() else run.recipe_file.name
        hint = "name the run.lock.json of a run; its recipe.yaml lies beside it"
        raise UserError(f"there is no {missing}", where=str(run.path), hint=hint)
    known = run.lock.get("recipe")
    if known is None:
        raise UserError("the lock was written by a version that kept no hashes", where=str(run.lock_file))
    if recipe_hash(run.recipe) != known:
        hint = "put it back; what is to be different this time goes behind the lock, as key=value"
        raise UserError("the recipe is not the one that was trained", where=str(run.recipe_file), hint=hint)
    return run


def changed_contents(run: Run, recipe: Recipe, allow: Sequence[str]) -> list[Problem]:
    """Rows, template, tokenizer and base whose contents are others than the run's. Preparation fills the cache."""
    lock = run.lock
    hashes = prepare_data(recipe, allow=allow).hashes
    was, now = lock["hashes"], hashes
    problems = []
    # A file that only moved is the same data.
    if sorted(was["data"].values()) != sorted(now["data"].values()):
        others = [label for label, one in now["data"].items() if one not in was["data"].values()]
        problems += [Problem("the rows are not those of the run", label) for label in others]
        gone = [label for label, one in was["data"].items() if one not in now["data"].values() and label not in others]
        problems += [Problem("the run had these rows too", label) for label in gone]
    problems += [
        Problem(f"the {name} is not the run's") for name in ("template", "tokenizer") if was[name] != now[name]
    ]
    if lock["base_hash"] is not None:
        folder = locate_base(recipe.model.base, recipe.model.revision)
        if folder_fingerprint(folder) != lock["base_hash"]:
            problems.append(Problem("the base model is not the run's", str(folder), "model.base"))
    return problems


def changed_surroundings(lock: dict[str, Any]) -> list[str]:
    """Versions, commit and device that are not as they were, in words: none of it stops anybody."""
    now = versions(tuple(name for name in lock["versions"] if name in ("bitsandbytes", "deepspeed")))
    said = [
        f"{name} {lock['versions'].get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in {**lock["versions"], **now}
        if lock["versions"].get(name) != now.get(name)
    ]
    if lock["commit"] != commit():
        said.append(f"commit {lock['commit']} → {commit()}")
    elif lock["commit"] is not None and lock["commit"].endswith("+changes"):
        said.append(f"commit {lock['commit']}: the tree had changes, and has some now, which nothing compares")
    if lock["device"] != device_name():
        said.append(f"device {lock['device']} → {device_name()}")
    return said


def rerun(
    path: Path, overrides: Sequence[str], *, output_dir: str | None, allow: Sequence[str], flags: Sequence[str]
) -> int:
    """Trains the run again into another folder, compares the curves, and returns the exit status of the training.

    allow: `changed-data`, and preflight faults by name; those that the run accepted are accepted again. flags: passed
    on to the trainer. UserError when contents changed, or the lock and its recipe do not belong together.
    """
    run = open_lock(path)
    faults = [name for name in allow if name != CHANGED_DATA]
    accepted = list(dict.fromkeys([*run.lock["data"]["allowed"], *faults]))
    target = output_dir or f"{run.path}-rerun"
    settings = [*overrides, f"output_dir={json.dumps(str(target))}"]
    recipe = load_recipe(run.recipe_file, settings)
    problems = changed_contents(run, recipe, accepted)
    if problems and CHANGED_DATA not in allow:
        hint = f"put it back, or train on what is there with --allow {CHANGED_DATA}"
        raise UserError([*problems[:-1], Problem(problems[-1].what, problems[-1].where, problems[-1].key, hint)])
    for problem in problems:
        _say(f"changed: {problem}")
    for line in changed_surroundings(run.lock):
        _say(f"changed: {line}")
    settings += cut_as_before(run, recipe, overrides)
    more = [flag for name in accepted for flag in ("--allow", name)]
    if recipe.model == run.recipe.model and recipe.adapter == run.recipe.adapter:
        more += ["--compute-dtype", run.lock["compute_dtype"]]
    status = launch(str(run.recipe_file), settings, [*flags, *more])
    if status == 0:
        print_comparison(run, Run(Path(recipe.run_dir).resolve()))
    return status


def cut_as_before(run: Run, recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """What `auto` became for the run, where the same number of processes is asked for and nobody says otherwise."""
    launcher = resolve(run.recipe_file, overrides).launcher
    cut = cut_in_force(run.lock)
    asked = launcher.processes if launcher is not None else 1
    if asked != cut["world_size"]:
        _say(f"changed: {cut['world_size']} processes → {asked}; the losses agree to rounding at best")
        return []
    if recipe.training.micro_batch != "auto":
        return []
    return [f"training.micro_batch={cut['micro_batch']}"]


def print_comparison(first: Run, second: Run) -> None:
    """How far the two curves lie apart, and what of how they were computed differs."""
    for name in HOW:
        if first.lock.get(name) != second.lock.get(name):
            _say(f"changed: {name} {first.lock.get(name)} → {second.lock.get(name)}")
    if first.lock.get("resumed"):
        _say("the first run was resumed, which may round sums in other places")
    print(f"{first.path.name} against {second.path.name}: {compare(first, second)}", flush=True)


def compare(first: Run, second: Run) -> Agreement:
    """The losses of two runs, step by step and evaluation by evaluation."""

    def gaps(key: str) -> list[float]:
        a, b = _curve(first, key), _curve(second, key)
        return [abs(a[step] - b[step]) for step in a.keys() & b.keys()]

    steps, evaluations = gaps("loss"), gaps("eval_loss")
    return Agreement(len(steps), max(steps, default=0.0), len(evaluations), max(evaluations, default=0.0))


def _curve(run: Run, key: str) -> dict[int, float]:
    lines = map(json.loads, run.metrics_file.read_text(encoding="utf-8").splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
