"""How a run ends: what was trained is saved, read back, asked again, merged and proven; or it was stopped."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from transformers.integrations import unset_hf_deepspeed_config

from llama_ft.data.prepare import Prepared
from llama_ft.errors import MachineFault
from llama_ft.export.proof import pick_device
from llama_ft.export.run import Export, export_run
from llama_ft.llama.load import DTYPES
from llama_ft.recipe.run import Run
from llama_ft.train.adapter import save_adapter, save_full
from llama_ft.train.guards import document_losses, losses_of
from llama_ft.train.load import load_for_training
from llama_ft.train.progress import plot_losses
from llama_ft.train.report import print_report
from llama_ft.train.resume import note_result
from llama_ft.train.samples import Samples
from llama_ft.train.sharding.parts import whole_weights
from llama_ft.train.start import Start
from llama_ft.train.trainer import LlamaTrainer
from llama_ft.train.warn import Warnings

ASKED_OF_BOTH = 4
"""Documents whose loss shows that gathered weights are those that were trained."""
APART = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""How far, relative to a loss of one nat or more, two computations of it may lie apart, by the type of products."""


def finish(
    trainer: LlamaTrainer, start: Start, compute: torch.dtype, samples: Samples | None, warnings: Warnings
) -> None:
    """Saves what was trained, reads it back, answers the held-out questions again, merges, proves, reports.

    Every process calls it; the main one goes on alone when it has the weights. compute: the type they are held in.
    """
    run, recipe, prepared = start.run, start.recipe, start.prepared
    trainer.accelerator.wait_for_everyone()
    result = trainer.settle_result()
    model = whole_model(trainer, start, compute, samples)
    if samples is None or model is None:  # only the main process writes
        return
    note_result(run, result, start.console)
    if recipe.adapter.method == "full":
        save_full(model, prepared.tokenizer, run, DTYPES[recipe.export.dtype or recipe.model.dtype])
    else:
        save_adapter(model, prepared.tokenizer, run)
    plot_losses(run)
    samples.answer(model, "after")
    warnings.finished(model, samples)
    proof: Export | None = export_run(run, trained=model) if recipe.export.merged else None
    print_report(run, proof, start.console)
    if recipe.export.gguf:
        from llama_ft.export.gguf.write import write_ggufs

        write_ggufs(run, recipe.export.gguf, prepared=prepared)


def whole_model(trainer: LlamaTrainer, start: Start, compute: torch.dtype, samples: Samples | None) -> Any:
    """The trained model with all of its weights, in the main process; None in the others where an engine cuts weights.

    There it is put together: loaded as at the start of the run, asked its questions a first time, and given every
    weight that the engine held. The loss of some documents must be the one that all processes computed together.
    MachineFault if it is not.
    """
    parts = trainer.parts
    if parts is None or not parts.cut:
        return trainer.accelerator.unwrap_model(trainer.model)
    documents = some_documents(start.prepared)
    together = document_losses(trainer, documents)
    sharded: Any = trainer.model
    weights = whole_weights(parts, sharded, main=start.main, trained=False)
    if samples is None:
        return None
    unset_hf_deepspeed_config()  # transformers would cut up what is loaded from here on
    model: Any = load_for_training(start.base, torch.device("cpu"), str(compute).removeprefix("torch.")).model
    model.to(pick_device(model))
    if samples.lacks("before"):  # a run that was stopped on its way here may have asked already
        samples.answer(model, "before")
    model.load_state_dict(weights)
    model.eval()
    alone = losses_of(model, documents, model.device)
    # On a GPU trained float32 masters are multiplied in the recipe's type.
    apart = APART[compute if start.state.device.type == "cpu" else DTYPES[start.recipe.model.dtype]]
    if any(abs(one - other) > apart * max(1.0, other) for one, other in zip(alone, together, strict=True)):
        raise MachineFault(
            f"the weights that were gathered are not those that were trained: losses {alone} and {together}",
            where=str(start.run.path),
            hint="the last checkpoint is whole; go on with --resume",
        )
    return model


def some_documents(prepared: Prepared) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of the first documents of the training set, the same in every process."""
    rows = [prepared.train[number] for number in range(min(ASKED_OF_BOTH, len(prepared.train)))]
    return [(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]


def say_stopped(run: Run, console: Console) -> None:
    """After Ctrl-C or SIGTERM: where the run stands and how it goes on."""
    steps = run.steps()
    if steps:
        console.print(
            f"stopped after step {steps[-1]}; {run.checkpoint(steps[-1])} is whole", highlight=False, soft_wrap=True
        )
        console.print("go on with the same command and --resume", highlight=False)
