"""The road of one run: check, prepare, load, train, save, merge, prove, report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from accelerate import PartialState
from rich.console import Console

from llama_ft.data.batches import PackedCollator, PaddedCollator
from llama_ft.data.prepare import Prepared, prepare_data
from llama_ft.data.show import rows_line
from llama_ft.export.run import Export, export_run
from llama_ft.files import write_json, write_text
from llama_ft.llama.load import DTYPES
from llama_ft.recipe import dump
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.trainable import check_trainable
from llama_ft.train.adapter import save_adapter, save_full
from llama_ft.train.base import Base, load_for_training, open_base, trains_base_weights, write_base
from llama_ft.train.checks import (
    check_disk,
    check_run_folder,
    check_same_data,
    check_writable,
    clear_run_folder,
    disk_faults,
)
from llama_ft.train.ends import EndToken
from llama_ft.train.engine import check_engine, check_launch, engine_of, settle_engine
from llama_ft.train.fit import corrected_once
from llama_ft.train.guards import Guard
from llama_ft.train.lock import lock_contents
from llama_ft.train.optimizer import check_optimizer
from llama_ft.train.planned import cut_of_run, peak_bytes, plan_of_run, write_measured
from llama_ft.train.progress import ProgressLine, plot_losses
from llama_ft.train.report import print_report
from llama_ft.train.resume import Resumed, note_result, open_resumed, record
from llama_ft.train.samples import Samples
from llama_ft.train.steps import EpochOrder, with_silence
from llama_ft.train.stop import STOPPED, StopCleanly
from llama_ft.train.trackers import check_trackers
from llama_ft.train.trainer import LlamaTrainer, training_arguments
from llama_ft.train.warn import Warnings
from llama_ft.train.watch import Watch


def train_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow: Sequence[str] = (),
    compute_dtype: str | None = None,
) -> Run:
    """Trains a recipe in the processes the launcher started, exports and proves it. Returns the finished run.

    resume: go on from the newest whole checkpoint; overwrite: replace a run in the same folder; allow: preflight
    faults to accept by name; compute_dtype: the type that another run's weights were held in, in place of the one that
    this machine finds the faster. Raises UserError for what the user can mend, MachineFault for what the machine did.
    A run stopped by Ctrl-C leaves through SystemExit(130) after its checkpoint.
    """
    run = Run(Path(recipe.run_dir).resolve())
    stop = StopCleanly(run)
    stop.install()
    try:
        with disk_faults(run):

            def train(micro_batch: int | None) -> None:
                again = micro_batch is not None
                flags = {"resume": resume and not again, "overwrite": overwrite or again}
                began = {"compute_dtype": compute_dtype}
                _train(run, recipe, stop, began, **flags, allow=allow, micro_batch=micro_batch)

            corrected_once(train, recipe, run)
    finally:
        stop.restore()
    return run


def _train(
    run: Run,
    recipe: Recipe,
    stop: StopCleanly,
    lock: dict[str, Any],
    *,
    resume: bool,
    overwrite: bool,
    allow: Sequence[str],
    micro_batch: int | None,
) -> None:
    check_launch()
    check_trainable(recipe)
    check_trackers(recipe)
    check_optimizer(recipe)
    state = PartialState(cpu=not torch.cuda.is_available())
    check_engine(engine_of(state))
    use_physical_cores(state)
    console = Console(quiet=not state.is_main_process)
    check_run_folder(run, resume=resume, overwrite=overwrite)
    resumed = open_resumed(run, recipe, state, console) if resume else Resumed()
    step = resumed.step
    check_writable(run)

    with state.main_process_first(), rows_line(shown=state.is_main_process) as said:
        prepared = prepare_data(recipe, allow=allow, progress=said)
    lock = began_with(run, prepared) if step else lock
    base = open_base(recipe, run, prepared.tokenizer, resume=step is not None)
    planned = plan_of_run(base, prepared, state, micro_batch, lock.get("compute_dtype"))
    kept = micro_batch is None and resumed.keeps("training.micro_batch")
    micro_batch, accumulation = cut_of_run(planned, lock, state, kept=kept)
    documents = len(prepared.mixture)
    check_storage(base, run, documents, fresh=step is None)
    if base.new and step is None:
        if state.is_main_process:
            clear_run_folder(run)
            write_base(base, prepared.tokenizer)
        state.wait_for_everyone()
    loaded = load_for_training(base, state.device, lock.get("compute_dtype"))
    arguments = training_arguments(
        recipe,
        run,
        micro_batch,
        accumulation,
        has_eval=prepared.eval is not None,
        masters=trains_base_weights(base),
    )
    if state.is_main_process and step is None:
        if not base.new:  # nothing of an earlier run is deleted before this one is known to start
            clear_run_folder(run)
        write_text(run.recipe_file, dump(recipe))
        lock = lock_contents(base, prepared, loaded, state, micro_batch, accumulation)
        write_json(run.lock_file, lock | {"plan": planned.for_lock()})
    elif state.is_main_process:
        record(run, recipe, resumed, (state.num_processes, micro_batch, accumulation), console)
    everything = base.parameters if base.full else base.parameters + base.trained
    console.print(
        f"{recipe.name}: {counted(prepared)}, {base.trained:,} of {everything:,} weights trained, global batch "
        f"{recipe.training.global_batch} = {micro_batch} × {accumulation} × {state.num_processes}, "
        f"{str(loaded.compute_dtype).removeprefix('torch.')} on {state.device.type} "
        f"({torch.get_num_threads()} threads)",
        highlight=False,
        soft_wrap=True,
    )

    watch = Watch(run, base, loaded, prepared, state, console, step)
    warnings = Warnings(run, recipe, console, step)
    trainer = LlamaTrainer(
        model=loaded.model,
        args=arguments,
        data_collator=PackedCollator() if recipe.sequence.packing else PaddedCollator(prepared.tokenizer.pad_token_id),
        eval_dataset=prepared.eval.with_format("numpy") if prepared.eval is not None else None,
        processing_class=prepared.tokenizer,
        callbacks=[stop, *watch.callbacks, *([warnings] if state.is_main_process else [])],
        run=run,
        recipe=recipe,
        stop=stop,
        guard=Guard(run, recipe, prepared),
        ends=EndToken.of(prepared),
        **training_set(prepared, recipe, micro_batch, state.num_processes),
    )
    settle_engine(trainer.accelerator, recipe, loaded.compute_dtype, console, warnings.say)
    watch.ask(trainer)
    if prepared.eval is not None and step is None:
        trainer.evaluate()
    with watch.status.kept(watch.callbacks):
        train_until_done_or_stopped(trainer, run.checkpoint(step) if step else None, watch.progress)
        trained_with = peak_bytes(state.device)
        if stop.asked:
            say_stopped(run, console)
            raise SystemExit(STOPPED)
        finish(trainer, prepared, run, console, watch.samples, warnings)
        if state.is_main_process:
            write_measured(run, state, trainer.state.global_step, trained_with)


def counted(prepared: Prepared) -> str:
    """How many documents an epoch has, in words."""
    return f"{len(prepared.mixture):,} documents" if prepared.stream is None else "streamed documents"


def training_set(prepared: Prepared, recipe: Recipe, micro_batch: int, processes: int) -> dict[str, Any]:
    """What the trainer reads, and in which order: grouped by length where micro-batches are padded."""
    stream = prepared.stream
    if stream is not None:
        return {"train_dataset": datasets.IterableDataset.from_generator(lambda: iter(stream)), "order": None}
    lengths = None if recipe.sequence.packing else prepared.lengths
    at_once = micro_batch * processes if processes > 1 else 1
    order = EpochOrder(prepared.mixture, recipe.training.global_batch, lengths, at_once)
    documents = prepared.train if processes == 1 else with_silence(prepared.train)
    return {"train_dataset": documents.with_format("numpy"), "order": order}


def began_with(run: Run, prepared: Prepared) -> dict[str, Any]:
    """The lock of a run that is resumed; UserError if its data has changed."""
    check_same_data(run.lock, prepared.hashes, run)
    return run.lock


def train_until_done_or_stopped(trainer: LlamaTrainer, checkpoint: Path | None, progress: ProgressLine) -> None:
    """The loop itself, with the terminal given back however it ends."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()


def check_storage(base: Base, run: Run, documents: int, *, fresh: bool) -> None:
    """Refuses a run that the disk has no room for; a run that is resumed has its base already."""
    recipe = base.recipe
    steps_per_epoch = math.ceil(documents / recipe.training.global_batch)
    steps = recipe.training.max_steps or math.ceil(steps_per_epoch * recipe.training.epochs)
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


def use_physical_cores(state: PartialState) -> None:
    """accelerate's launcher sets one thread per process unless told otherwise; a CPU run wants all physical cores."""
    if state.device.type == "cpu":
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        torch.set_num_threads(max(1, cores // max(1, state.num_processes)))


def say_stopped(run: Run, console: Console) -> None:
    """After Ctrl-C or SIGTERM: where the run stands and how it goes on."""
    steps = run.steps()
    if steps:
        console.print(
            f"stopped after step {steps[-1]}; {run.checkpoint(steps[-1])} is whole", highlight=False, soft_wrap=True
        )
        console.print("go on with the same command and --resume", highlight=False)


def finish(
    trainer: LlamaTrainer,
    prepared: Prepared,
    run: Run,
    console: Console,
    samples: Samples | None,
    warnings: Warnings,
) -> None:
    """Saves what was trained, reads it back, answers the held-out questions again, merges, proves, reports."""
    recipe = run.recipe
    trainer.accelerator.wait_for_everyone()
    if samples is None:  # only the main process writes
        return
    note_result(run, trainer.settle_result(), console)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.adapter.method == "full":
        save_full(model, prepared.tokenizer, run, DTYPES[recipe.export.dtype or recipe.model.dtype])
    else:
        save_adapter(model, prepared.tokenizer, run)
    plot_losses(run)
    samples.answer(model, "after")
    warnings.finished(model, samples)
    proof: Export | None = export_run(run, trained=model) if recipe.export.merged else None
    print_report(run, proof, console)
