"""How a run ends: what was trained is saved, read back, asked again, merged and proven; or it was stopped."""

from __future__ import annotations

from rich.console import Console

from llama_ft.data.prepare import Prepared
from llama_ft.export.run import Export, export_run
from llama_ft.llama.load import DTYPES
from llama_ft.recipe.run import Run
from llama_ft.train.adapter import save_adapter, save_full
from llama_ft.train.progress import plot_losses
from llama_ft.train.report import print_report
from llama_ft.train.resume import note_result
from llama_ft.train.samples import Samples
from llama_ft.train.trainer import LlamaTrainer
from llama_ft.train.warn import Warnings


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


def say_stopped(run: Run, console: Console) -> None:
    """After Ctrl-C or SIGTERM: where the run stands and how it goes on."""
    steps = run.steps()
    if steps:
        console.print(
            f"stopped after step {steps[-1]}; {run.checkpoint(steps[-1])} is whole", highlight=False, soft_wrap=True
        )
        console.print("go on with the same command and --resume", highlight=False)
