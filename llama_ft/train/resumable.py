"""transformers' loop made to stop anywhere and go on exactly: what is saved when, and what is restored from it."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl import SFTTrainer

from llama_ft.data.pretraining import PackStream
from llama_ft.errors import MachineFault
from llama_ft.files import flush_to_disk, publish
from llama_ft.plan.steps import per_device
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.agree import said_by_main
from llama_ft.train.checkpoints import ASIDE, Best, best_checkpoint, position_of, remove_old, seal, verify
from llama_ft.train.sharding.checkpoint import load_optimizer, load_weights, save_optimizer, whole_for_file
from llama_ft.train.sharding.parts import Parts, parts_of
from llama_ft.train.steps import EpochOrder, PackOrder
from llama_ft.train.stop import StopCleanly


class ResumableTrainer(SFTTrainer):
    """A trainer whose `checkpoints/step-N` is complete or absent, and holds all that the next step depends on.

    `tokens_seen` and `labelled_seen` count this process's training tokens; after a resume the first process also has
    those of the run before, so that sums over all processes go on where they stood. `packs`: of a streamed run of
    pretrain, what it reads. `parts`: how the engine has cut weights or optimizer states, None where every process has
    them whole.
    """

    def __init__(
        self,
        *args: Any,
        run: Run,
        recipe: Recipe,
        order: EpochOrder | PackOrder | None,
        stop: StopCleanly,
        packs: PackStream | None = None,
        **kwargs: Any,
    ):
        self.run, self.recipe, self.order, self.stop, self.packs = run, recipe, order, stop, packs
        self.tokens_seen = 0
        self.labelled_seen = 0
        self.held_out: tuple[int, float] | None = None
        self.evaluation_due = False
        self.resumed_from: str | None = None
        self.parts: Parts | None = None
        self.trained_order: list[list[str]] = []
        super().__init__(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run.checkpoints / ASIDE)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        aside, step = self.run.checkpoints / ASIDE, self.state.global_step
        with self.stop.saving():
            try:
                if self.is_world_process_zero():
                    shutil.rmtree(aside, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                position = self._position()
                self.accelerator.wait_for_everyone()  # every process has written its random numbers
                if self.is_world_process_zero():
                    written = aside / f"checkpoint-{step}"
                    seal(written, self.run, position)
                    if self.run.metrics_file.exists():  # what it says of these steps lasts as long as the checkpoint
                        flush_to_disk(self.run.metrics_file)
                    publish(written, self.run.checkpoint(step))
                    remove_old(self.run, self.recipe.training.keep_checkpoints)
            finally:
                if self.is_world_process_zero():  # another rank would remove it while this one still publishes
                    shutil.rmtree(aside, ignore_errors=True)
        if self.stop.agreed():
            self.control.should_training_stop = True

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The loop. What must be asked of the weights of the start is asked before a checkpoint's are loaded."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.before_training()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def before_training(self) -> None:
        """Called by every process when the model is where it trains and has the weights that the run began with."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Where an engine cuts up weights or states, ours are put back, and not the engine's own files read."""
        cuts = self.is_fsdp_enabled or self.is_deepspeed_enabled
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if cuts else resume_from_checkpoint)
        self.parts = parts_of(self)
        if cuts:
            self.before_training()
        if self.parts is not None and resume_from_checkpoint is not None:
            load_weights(self.parts, self.model, Path(resume_from_checkpoint))
            load_optimizer(self, Path(resume_from_checkpoint))
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Whole weights, whatever engine trains."""
        if self.parts is None:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_for_file(self.parts, self.model, main=self.is_world_process_zero())
        if self.is_world_process_zero():
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.parts is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            save_optimizer(self, Path(output_dir))

    def _position(self) -> dict[str, Any]:
        """Where the data stands after this step, and what a run that goes on from here cannot find out again."""
        step, batch = self.state.global_step, per_device(self.recipe, 1)
        documents = len(self.order.mixture) if self.order is not None else None  # None: a stream has no epochs
        epoch, steps = divmod(step, math.ceil(documents / batch)) if documents else (0, step)
        tokens, labelled = self.over_all_ranks(self.tokens_seen, self.labelled_seen)
        return {
            "step": step,
            "epoch": epoch,
            "documents": steps * batch,
            "micro_batches": steps * self.args.gradient_accumulation_steps,
            "micro_batch": self.args.per_device_train_batch_size,
            "accumulation": self.args.gradient_accumulation_steps,
            "world_size": self.args.world_size,
            "packing": self.recipe.sequence.packing,
            "grouped_by_length": self.order is not None and not self.order.packing,
            "tokens": tokens,
            "labelled_tokens": labelled,
            "held_out_loss": self.held_out[1] if self.held_out and self.held_out[0] == step else None,
            "evaluation_due": self.evaluation_due,
            # Where a streamed mixture stands: the last window of documents that these steps had begun.
            "stream": self.packs.mark(step * batch) if self.packs is not None else None,
        }

    def over_all_ranks(self, *counts: int) -> list[int]:
        """Sums over all processes."""
        return self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum").tolist()

    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Restores position.json; how often to save and to evaluate is the recipe's to say, not the state's."""
        found = super()._init_training_state(max_steps, updates, epochs, resume_from_checkpoint, trial)
        self.state.compute_steps(self.args, max_steps)
        if resume_from_checkpoint is not None:
            self.resumed_from = resume_from_checkpoint
            position = position_of(Path(resume_from_checkpoint))
            if self.is_world_process_zero():
                self.tokens_seen, self.labelled_seen = position["tokens"], position["labelled_tokens"]
            if position["held_out_loss"] is not None:
                self.held_out = (position["step"], position["held_out_loss"])
            self.args.eval_on_start = position["evaluation_due"] and self.eval_dataset is not None
        return found

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where all steps are done: transformers would take one more of a run that ended inside an epoch."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        if self.order is not None:
            # accelerate's own way to the sampler ends where batches are both skipped and shared among processes: a run
            # resumed inside a later epoch would see the documents of the first.
            self.order.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """At the start of the loop (`skip_scheduler`) this is a fresh run's first, or the one that a stopped run still
        owed: its step's checkpoint is written again, with what was measured.
        """
        owed = skip_scheduler and self.resumed_from is not None
        if owed:
            self._load_rng_state(self.resumed_from)
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if owed and not self.evaluation_due:
            self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def after_evaluation(self, loss: float | None) -> None:
        """Notes what was measured in training, None for an evaluation that was given up.

        Asks for a checkpoint where the loss is a new best one and the recipe wants the best, and where the run stops.
        Before the first step there is nothing to keep.
        """
        if not self.state.global_step:
            self.control.should_training_stop |= self.stop.agreed()
            return
        self.evaluation_due = loss is None
        if loss is not None:
            self.held_out = (self.state.global_step, loss)
            if self.recipe.export.checkpoint == "best":
                # One process looks: two that see another disk's state would wait for each other.
                best = best_checkpoint(self.run) if self.is_world_process_zero() else Best(0, -math.inf)
                lower = best is None or loss < best.held_out_loss
                self.control.should_save |= bool(self.over_all_ranks(int(lower))[0])
        if self.stop.agreed():
            self.control.should_save = self.control.should_training_stop = True

    def settle_result(self) -> dict[str, Any]:
        """Puts the weights that become the result into the model: the last, or the best checkpoint's on request.

        Returns which: `checkpoint`, `step`, `held_out_loss` and, of the best, `last_held_out_loss`. Called by every
        process when all steps are done. MachineFault if the best is damaged.
        """
        result = said_by_main(self._find_result, main=self.is_world_process_zero())
        if result["step"] != self.state.global_step:
            folder = self.run.checkpoint(result["step"])
            if self.parts is None:
                self._load_from_checkpoint(str(folder))
            else:
                load_weights(self.parts, self.model, folder)
        return result

    def _find_result(self) -> dict[str, Any]:
        step = self.state.global_step
        last = self.held_out[1] if self.held_out and self.held_out[0] == step else None
        best = best_checkpoint(self.run) if self.recipe.export.checkpoint == "best" else None
        if best is None:
            return {"checkpoint": "last", "step": step, "held_out_loss": last}
        folder = self.run.checkpoint(best.step)
        faults = verify(folder)
        if faults:
            raise MachineFault(
                f"the best checkpoint is damaged ({'; '.join(faults)})",
                where=str(folder),
                hint="the last weights can be the result: --resume export.checkpoint=last",
            )
        found = {"checkpoint": "best", "step": best.step, "held_out_loss": best.held_out_loss}
        return {**found, "last_held_out_loss": last}


@contextmanager
def kept_random_numbers(device: torch.device) -> Iterator[None]:
    """Puts the generators of python, numpy and torch back to where they stood: what is done inside does not show."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
