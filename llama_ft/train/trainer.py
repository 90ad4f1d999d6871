"""TRL's SFTTrainer with our loss, our evaluation and our checkpoints; the loop itself is transformers' own."""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from llama_ft.adapters.lora import stack_projections
from llama_ft.llama.head import IGNORE
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe
from llama_ft.train.by_source import BySource, evaluated_sources
from llama_ft.train.ends import EndToken
from llama_ft.train.guards import Guard
from llama_ft.train.optimizer import make_optimizer, make_schedule, optimizer_arguments
from llama_ft.train.resumable import ResumableTrainer, kept_random_numbers
from llama_ft.train.sharding.on_cpus import allow_fsdp2_on_cpus
from llama_ft.train.sharding.parts import order_of
from llama_ft.train.steps import EpochOrder, PackOrder


def training_arguments(
    recipe: Recipe, run: Run, micro_batch: int, accumulation: int, *, has_eval: bool, masters: bool, fresh: bool = True
) -> SFTConfig:
    """The recipe's `training` section in TRL's words. Our data is prepared already and our model owns its types.

    masters: weights of the base itself are trained. fresh: the run begins, and so with an evaluation.
    """
    training = recipe.training
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(run.checkpoints),
        # The packs of a run of pretrain are laid out for all its epochs at once, and read in one pass.
        num_train_epochs=1.0 if training.objective == "pretrain" else float(training.epochs),
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        **optimizer_arguments(training),
        gradient_checkpointing=bool(training.gradient_checkpointing),
        gradient_checkpointing_kwargs={"use_reentrant": False} if training.gradient_checkpointing else None,
        seed=training.seed,
        # Trained weights of the base are float32 masters and are multiplied in the recipe's type on a GPU; an adapter's
        # frozen base is already stored in it. Autocast on a CPU would recast frozen weights at every call.
        bf16=on_gpu and masters and recipe.model.dtype == "bfloat16",
        fp16=on_gpu and masters and recipe.model.dtype == "float16",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,  # every trained weight is in every forward pass
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_every,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=training.eval_every,
        eval_on_start=has_eval and fresh,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        accelerator_config=accelerator_config(recipe),
        max_length=None,
    )


def accelerator_config(recipe: Recipe) -> dict[str, Any] | None:
    """What transformers passes on to accelerate."""
    config: dict[str, Any] = {}
    if recipe.mixture.streaming:
        # Every process reads a streamed set and keeps its share: batches of unequal length cannot be dispatched.
        config["dispatch_batches"] = False
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        # Between the passes of a step FSDP would keep whole gradients on every device, in 16 bits where it multiplies
        # in them: as much as the shards were to save. Summed in each pass, they are float32 shards.
        config["gradient_accumulation_kwargs"] = {"sync_each_batch": True}
    return config or None


class LlamaTrainer(ResumableTrainer):
    """Trains on documents that are ids and labels already.

    The loss is the model's own head, which TRL would bypass; evaluation is the exact nll per labelled token.
    """

    def __init__(
        self,
        *args: Any,
        guard: Guard,
        ends: EndToken | None,
        by_source: BySource | None = None,
        eval_bytes: int = 0,
        **kwargs: Any,
    ):
        """eval_bytes: of the held-out text, where bits per byte are to be told."""
        self.guard, self.ends, self.by_source, self.eval_bytes = guard, ends, by_source, eval_bytes
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if isinstance(self.model, PeftModel) and self.args.device.type == "cuda" and not sharded:
            base: Any = self.model.get_base_model()
            stack_projections(base)  # the trainer has just moved the model to its device
        self.step_began = (0.0, 0, 0)

    def create_accelerator_and_postprocess(self) -> None:
        """Called once as the trainer is made."""
        allow_fsdp2_on_cpus()
        super().create_accelerator_and_postprocess()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the micro-batch's nll over the labelled tokens of the whole global batch."""
        watched = self.by_source if model.training else None
        asked = {"by_document": True} if watched is not None else {}
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, **asked)
        loss = outputs.loss
        if watched is not None:
            watched.add(outputs.document_losses)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the engine averages gradients over ranks; we want their sum
        if model.training:
            mask = inputs.get("attention_mask")
            tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            self.pass_done(loss, tokens, int((inputs["labels"] != IGNORE).sum()))
        return (loss, outputs) if return_outputs else loss

    def asking(self) -> AbstractContextManager[None]:
        """Around drawing and scoring answers, which takes as long as it takes: the other processes wait for it."""
        peers = self.stop.peers
        return peers.headway.pausing("drawing and scoring answers") if peers is not None else nullcontext()

    def pass_done(self, loss: Tensor, tokens: int, labelled: int) -> None:
        """After the forward pass of every micro-batch that is trained on, with what was in it."""
        self.guard.add(loss)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.guard.check(self, None)  # DeepSpeed's backward takes the step with it
        self.tokens_seen += tokens
        self.labelled_seen += labelled

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer; called by transformers once the model is where it trains."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = make_optimizer(self, trained, self.recipe)
            self.trained_order = order_of(self.optimizer, trained)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's learning rate over so many steps."""
        if self.lr_scheduler is None:
            followed: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = make_schedule(followed, self.recipe.training, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder | PackOrder | None:
        return self.order

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out loss: nats per labelled token over all of it, however it is batched. Logged as `eval_loss`.

        The random numbers stand afterwards where they stood before. Answers {} where a signal came while training.
        """
        start = time.perf_counter()
        metrics: dict[str, Any] = {}
        with kept_random_numbers(self.args.device):
            measured = self.measure(self.get_eval_dataloader(eval_dataset))
            if measured is not None:
                measured["seconds"] = round(time.perf_counter() - start, 3)
                if self.eval_bytes:
                    nats = measured["loss"] * measured["labelled_tokens"]
                    measured["bits_per_byte"] = nats / math.log(2) / self.eval_bytes
                if self.ends is not None:
                    measured["end_probability"] = self.ends.probability(self)
                metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
                self.log(metrics)
                self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train:
            self.after_evaluation(measured["loss"] if measured is not None else None)
        return metrics

    @torch.no_grad()
    def measure(self, batches: Any) -> dict[str, Any] | None:
        """Nats per labelled token (`loss`) and their number over a data loader, over all ranks; None if stopped.

        With several sources also `loss_by_source`.
        """
        model: Any = self.model_wrapped if self.accelerator._models else self.model
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        apart = BySource.of(evaluated_sources(self.recipe), self.args.device) if self.by_source is not None else None
        for batch in batches:
            if self.is_in_train and self.stop.agreed():
                model.train(was_training)
                return None
            inputs: dict[str, Any] = self._prepare_inputs(batch)
            origins = inputs.pop("origins", [])
            outputs = model(**inputs, num_items_in_batch=1, **({"by_document": True} if apart is not None else {}))
            total[0] += outputs.loss.double()
            total[1] += (inputs["labels"] != IGNORE).sum()
            if apart is not None:
                apart.add(outputs.document_losses, apart.count(inputs, origins))
        model.train(was_training)
        nats, labelled = self.accelerator.reduce(total, "sum").tolist()
        found = {"loss": nats / labelled if labelled else math.nan, "labelled_tokens": int(labelled)}
        return found if apart is None else found | {"loss_by_source": apart.take(self.accelerator)["loss"]}

    def means(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """Figures over all processes: each one's sum by its count, and the number of items."""
        total: dict[str, list[float]] = {}
        for one in gather_object([{name: both.tolist() for name, both in figures.items()}]):
            for name, both in one.items():  # a process that had nothing to do knows no figures
                total[name] = [a + b for a, b in zip(total.get(name, [0.0, 0.0]), both, strict=True)]
        found = {name: value / count for name, (value, count) in total.items() if count}
        return {**found, "items": int(max((count for _, count in total.values()), default=0))}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Called once at the start of every optimizer step: the moment its clock starts."""
        self.step_began = (time.perf_counter(), self.tokens_seen, self.labelled_seen)
        batches, labelled = super().get_batch_samples(*args, **kwargs)
        self.guard.begin(batches)
        if self.by_source is not None:
            self.by_source.begin(self.guard.batches)
        return batches, labelled

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Called once per step, clipped or not, before the optimizer: the norm, if the step may be taken."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.guard.check(self, norm)
        return norm

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Adds to every training line the tokens so far and the step's own time and rate, over all ranks."""
        if "train_runtime" in logs:
            return  # transformers' summary at the end counts only what was done since the last resume
        if "loss" in logs:
            began, *before = self.step_began
            seconds = time.perf_counter() - began
            counts = [self.tokens_seen, self.labelled_seen]
            counts += [now - then for now, then in zip(counts, before, strict=True)]
            totals = self.over_all_ranks(*counts)
            logs |= {
                "tokens": totals[0],
                "labelled_tokens": totals[1],
                "seconds": round(seconds, 4),
                "tokens_per_second": round(totals[2] / seconds, 2),
                "labelled_tokens_per_second": round(totals[3] / seconds, 2),
            }
            if self.by_source is not None:
                logs |= {f"{what}_by_source": of for what, of in self.by_source.take(self.accelerator).items()}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write its own README.md beside the checkpoints at every save; the export writes ours once."""
