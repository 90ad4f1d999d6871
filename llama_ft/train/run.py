"""The road of one run: check, prepare, load, train, save, merge, prove, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets

from llama_ft.data.batches import PackCollator, PackedCollator, PaddedCollator
from llama_ft.data.prepare import held_out_bytes
from llama_ft.data.pretraining import Packs, PackStream
from llama_ft.plan.steps import Cut, run_packs
from llama_ft.recipe.objectives import COMPARED, ONLINE
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.by_source import BySource
from llama_ft.train.checkpoints import position_of
from llama_ft.train.checks import disk_faults
from llama_ft.train.compared import compared_trainer
from llama_ft.train.ends import EndToken
from llama_ft.train.engine import engine_of, settle_engine
from llama_ft.train.finish import finish, say_stopped
from llama_ft.train.fit import corrected_once
from llama_ft.train.guards import Guard
from llama_ft.train.load import Loaded, load_for_training, trains_base_weights
from llama_ft.train.online_run import online_trainer, rejection_data, rejection_trainer
from llama_ft.train.planned import peak_bytes, write_measured
from llama_ft.train.progress import ProgressLine
from llama_ft.train.rewards.rewards import Rewards
from llama_ft.train.start import Flags, Start, make_new_base, open_start, say_start, write_start
from llama_ft.train.steps import EpochOrder, PackOrder, held_out, with_silence
from llama_ft.train.stop import STOPPED, StopCleanly
from llama_ft.train.together import joined
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

    def train(micro_batch: int | None) -> None:
        again = micro_batch is not None
        flags = Flags(resume and not again, overwrite or again, allow, compute_dtype, micro_batch)
        _train(open_start(run, recipe, flags), stop)

    stop.install()
    try:
        with joined(recipe, run, stop), disk_faults(run):
            corrected_once(train, recipe, run)
    finally:
        stop.restore()
    return run


def _train(start: Start, stop: StopCleanly) -> None:
    """Loads, trains until the end or until it is stopped, and finishes."""
    run, state = start.run, start.state
    with opened_rewards(start) as rewards:  # what is wrong with them is said before weights are read
        make_new_base(start)
        loaded = load_for_training(start.base, state.device, start.lock.get("compute_dtype"), engine_of(state))
        write_start(start, loaded)
        say_start(start, loaded)
        if rewards is not None and start.recipe.training.objective == "rejection_sampling":
            start = replace(start, prepared=rejection_data(start, loaded, rewards))
        watch = Watch(run, start.base, loaded, start.prepared, state, start.console, start.step)
        warnings = Warnings(run, start.recipe, start.console, start.step)
        callbacks = [stop, *watch.callbacks, *([warnings] if start.main else [])]
        trainer = make_trainer(start, loaded, callbacks, stop, rewards, warnings)
        settle_engine(trainer.accelerator, start.recipe, loaded.compute_dtype, start.console, warnings.say)
        if stop.peers is not None:
            stop.peers.watch(trainer)
        watch.ask(trainer)
        with watch.status.kept(watch.callbacks):
            train_until_done_or_stopped(trainer, run.checkpoint(start.step) if start.step else None, watch.progress)
            trained_with = peak_bytes(state.device)
            if stop.agreed():
                say_stopped(run, start.console)
                raise SystemExit(STOPPED)
            finish(trainer, start, loaded.compute_dtype, watch.samples, warnings)
            if start.main:
                write_measured(run, state, trainer.state.global_step, trained_with)


@contextmanager
def opened_rewards(start: Start) -> Iterator[Rewards | None]:
    """What scores answers, in a run that samples them; closed however the run ends."""
    if start.recipe.training.objective not in ONLINE:
        yield None
        return
    with closing(Rewards.open(start.recipe, start.state.device)) as rewards:
        yield rewards


def make_trainer(
    start: Start,
    loaded: Loaded,
    callbacks: list[Any],
    stop: StopCleanly,
    rewards: Rewards | None = None,
    warnings: Warnings | None = None,
) -> LlamaTrainer:
    """The trainer of a run, with its data in their order."""
    recipe, prepared = start.recipe, start.prepared
    cut = Cut(start.micro_batch, start.accumulation, start.state.num_processes)
    evaluated = held_out(prepared.eval, cut)
    args = training_arguments(
        recipe,
        start.run,
        start.micro_batch,
        start.accumulation,
        has_eval=prepared.eval is not None,
        masters=trains_base_weights(start.base),
        fresh=start.step is None,
    )
    common: dict[str, Any] = {
        "model": loaded.model,
        "args": args,
        "processing_class": prepared.tokenizer,
        "callbacks": callbacks,
        "run": start.run,
        "recipe": recipe,
        "stop": stop,
        "eval_dataset": evaluated.with_format("numpy") if evaluated is not None else None,
        **training_set(start, cut),
    }
    if recipe.training.objective in COMPARED:
        return compared_trainer(start, loaded, common)
    if rewards is not None and recipe.training.objective == "rejection_sampling":
        return rejection_trainer(start, loaded, common, rewards)
    if rewards is not None:
        return online_trainer(start, loaded, common, rewards, warnings if start.main else None)
    pretrain = recipe.training.objective == "pretrain"
    packed = PackCollator() if pretrain else PackedCollator()
    return LlamaTrainer(
        **common,
        data_collator=packed if recipe.sequence.packing else PaddedCollator(prepared.tokenizer.pad_token_id),
        guard=Guard(start.run, recipe, prepared),
        ends=EndToken.of(prepared),
        by_source=BySource.of(recipe.data, start.state.device),
        eval_bytes=held_out_bytes(prepared) if pretrain else 0,
    )


def training_set(start: Start, cut: Cut) -> dict[str, Any]:
    """What the trainer reads, and in which order: llama_ft/data/balance.py lays a step out for the cut."""
    prepared, recipe = start.prepared, start.recipe
    stream, length = prepared.stream, recipe.sequence.max_length
    pretrain = recipe.training.objective == "pretrain"
    if stream is not None and pretrain:
        mark = position_of(start.run.checkpoint(start.step)).get("stream") if start.step is not None else None
        packs = PackStream(stream, length, recipe.training.seed, mark)
        streamed = datasets.IterableDataset.from_generator(lambda: iter(packs))
        return {"train_dataset": streamed, "order": None, "packs": packs}
    if stream is not None:
        return {"train_dataset": datasets.IterableDataset.from_generator(lambda: iter(stream)), "order": None}
    if pretrain:
        found = run_packs(recipe, prepared.mixture, prepared.lengths)
        documents = with_silence(prepared.train).with_format("numpy")
        laid = Packs(documents, found, silent=len(prepared.train))
        return {"train_dataset": laid.dataset(), "order": PackOrder(found, cut)}
    order = EpochOrder(prepared.mixture, cut, prepared.lengths, packing=recipe.sequence.packing)
    documents = prepared.train if cut.world == 1 else with_silence(prepared.train)
    return {"train_dataset": documents.with_format("numpy"), "order": order}


def train_until_done_or_stopped(trainer: LlamaTrainer, checkpoint: Path | None, progress: ProgressLine) -> None:
    """The loop itself, with the terminal given back however it ends."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
