"""`llama-ft sweep`: each point of a grid as a run of its own, through the door of `llama-ft train`, ranked at the end.

A point's folder is named by its values alone, so that the same command goes on where it was stopped, and a grid that
was given further values trains the new points only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.evaluate.compare_table import aligned
from llama_ft.evaluate.sweep_grid import Point, points, read_grid
from llama_ft.evaluate.sweep_rank import Result, result_of, table, write_sweep
from llama_ft.recipe import resolve
from llama_ft.recipe.diff import differences, open_side, values
from llama_ft.recipe.load import Resolved
from llama_ft.recipe.run import Run
from llama_ft.train.launch import launch, launch_command

STOPPED = 130
"""Exit status of a run that Ctrl-C or SIGTERM ended."""
NEW, FINISHED, GOES_ON, ANEW = "new", "finished", "goes on", "begins again"
"""How a point stands before it is trained: `begins again` has no checkpoint, or is to be replaced."""
TRAINER = "llama_ft.train"
"""The module that trains, a word of its processes' command lines."""
FLAGS = {NEW: [], GOES_ON: ["--resume"], ANEW: ["--overwrite"]}


@dataclass(frozen=True)
class Job:
    """A point that may be trained: its recipe, its run folder, all its overrides, how it stands."""

    point: Point
    resolved: Resolved
    run: Run
    overrides: list[str]
    state: str


def run_sweep(
    recipe: str, grid: Sequence[str], *, out: Path | None, dry_run: bool, overwrite: bool, flags: Sequence[str]
) -> int:
    """Trains what is not trained yet, writes sweep.json, prints the ranking; returns the exit status.

    out: folder for the runs, None for runs/NAME-sweep; flags: passed on to each training. A run that fails leaves the
    others their turn, and its status is returned; Ctrl-C leaves a checkpoint and 130. UserError with the mistakes of
    all points, before any of them starts.
    """
    found = points(read_grid(grid))
    out, jobs = judge(recipe, found, out, overwrite=overwrite)
    if dry_run:
        rows = [[job.point.name, job.state, *job.overrides] for job in jobs]
        print("\n".join([*aligned(rows), f"{len(jobs)} points in {out}; none was trained"]))
        return 0
    lock = FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another sweep is under way in {out}", hint="wait for it, or name another --out") from None
    except OSError as error:
        raise UserError(f"the sweep's folder cannot be made: {error.strerror}", where=str(out)) from error
    with lock:
        refuse_orphans(jobs)
        return train_all(recipe, jobs, out, flags)


def judge(recipe: str, found: Sequence[Point], out: Path | None, *, overwrite: bool) -> tuple[Path, list[Job]]:
    """The folder of the sweep and a job for each point. UserError with every mistake of every point, each told once."""
    problems: list[Problem] = []
    judged: list[tuple[Point, Resolved]] = []
    for point in found:
        try:
            judged.append((point, resolve(recipe, point.overrides)))
            launch_command(recipe, list(point.overrides), [])
        except UserError as error:
            problems += error.problems
    problems += same(judged)
    if problems:
        raise UserError(dict.fromkeys(problems))
    folder = out or Path("runs", f"{judged[0][1].recipe.name}-sweep")
    if (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} is a run, not a folder of runs", hint="name another with --out FOLDER")
    jobs = []
    for point, resolved in judged:
        run = Run((folder / point.name).resolve())
        overrides = [*point.overrides, f"output_dir={json.dumps(str(folder / point.name), ensure_ascii=False)}"]
        state = ANEW if overwrite and run.recipe_file.exists() else state_of(run)
        problems += changed(run, resolved) if state in (FINISHED, GOES_ON) else []
        jobs.append(Job(point, resolved, run, overrides, state))
    if problems:
        raise UserError(problems)
    return folder, jobs


def same(judged: Sequence[tuple[Point, Resolved]]) -> list[Problem]:
    """Points that are written differently and are one: 1e-3 and 0.001, or values of a key that the recipe drops."""
    first: dict[str, str] = {}
    problems = []
    for point, resolved in judged:
        other = first.setdefault(resolved.recipe.model_dump_json(), point.name)
        if other != point.name:
            problems.append(Problem(f"{point.name} is the same recipe as {other}", hint="leave one of the values out"))
    return problems


def state_of(run: Run) -> str:
    """How a point's folder stands."""
    if not run.recipe_file.exists() and not run.checkpoints.exists():
        return NEW
    if result_of(run).state == FINISHED:
        return FINISHED
    return GOES_ON if run.steps() else ANEW


def changed(run: Run, resolved: Resolved) -> list[Problem]:
    """What a run that is there was trained with, and this sweep does not say."""
    try:
        before = values(open_side(str(run.path)))
    except UserError as error:
        return error.problems
    found = [one for one in differences(before, values(resolved)) if one.key != "output_dir"]
    hint = "train all points again with --overwrite, or name another --out"
    return [
        Problem(
            f"this point was trained with {one.a or 'nothing'}, not {one.b or 'nothing'}", str(run.path), one.key, hint
        )
        for one in found
    ]


def refuse_orphans(jobs: Sequence[Job]) -> None:
    """UserError where a point is still being trained: a sweep that was killed leaves its training behind, and a second
    one in the same folder would write over it."""
    points = {(job.overrides[-1], str(Path.cwd())): job.run.path for job in jobs}
    problems = []
    for process in psutil.process_iter():
        try:
            words, place = process.cmdline(), process.cwd()
        except (psutil.Error, OSError):  # gone by now, or another user's
            continue
        found = [path for (override, cwd), path in points.items() if override in words and cwd == place]
        if found and TRAINER in words:
            problems.append(
                Problem(f"process {process.pid} still trains it", str(found[0]), hint=f"wait, or kill {process.pid}")
            )
    if problems:
        raise UserError(problems)


def train_all(recipe: str, jobs: Sequence[Job], out: Path, flags: Sequence[str]) -> int:
    """Trains job after job; sweep.json is written after each of them."""
    failures: dict[str, int] = {}
    stopped = False
    try:
        for number, job in enumerate(jobs, 1):
            state = "done before" if job.state == FINISHED else job.state
            say(f"point {number} of {len(jobs)}: {job.point.name}: {state}")
            if job.state == FINISHED:
                continue
            status = launch(recipe, job.overrides, [*FLAGS[job.state], *flags])
            if status == STOPPED:
                stopped = True
                break
            if status:
                failures[job.point.name] = status
                say(f"{job.point.name} ended with status {status}; the others go on")
            write_list(out, recipe, jobs_results(jobs, failures))
    except KeyboardInterrupt:  # between two runs, or before one of them answers it
        stopped = True
    finally:
        results = jobs_results(jobs, failures)
        write_list(out, recipe, results)
    print("\n".join(table(results)), flush=True)
    print(out / "sweep.json", flush=True)
    if stopped:
        say("stopped; the same command goes on from here")
        return STOPPED
    return next(iter(failures.values()), 0)


def jobs_results(jobs: Sequence[Job], failures: dict[str, int]) -> list[tuple[Point, Result]]:
    """Each point with what its folder shows now; nothing runs when this is asked, so what seems to was killed."""
    found = [(job.point, result_of(job.run, failures.get(job.point.name))) for job in jobs]
    return [(point, replace(one, state="stopped") if one.state == "running" else one) for point, one in found]


def write_list(out: Path, recipe: str, results: Sequence[tuple[Point, Result]]) -> None:
    """Writes sweep.json; MachineFault where the disk does not take it."""
    try:
        write_sweep(out, recipe, results)
    except OSError as error:
        hint = "make room, then start the same command again: it goes on from here"
        raise MachineFault(f"sweep.json cannot be written: {error.strerror}", where=str(out), hint=hint) from error


def say(text: str) -> None:
    """A line for the person who waits; stdout is for the result."""
    print(text, file=sys.stderr, flush=True)
