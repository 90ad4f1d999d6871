"""`export`: merge a run's adapter, open the result as a stranger would, and prove it equal to what was trained."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from llama_ft.adapters.lora_file import read_lora
from llama_ft.adapters.merge import disk_fault, merge_adapter
from llama_ft.adapters.quantised import requantised
from llama_ft.data.prepare import inspect_data
from llama_ft.errors import Problem, UserError
from llama_ft.export.card import write_card
from llama_ft.export.folder import write_companions
from llama_ft.export.job import Job, Options
from llama_ft.export.prove import prove
from llama_ft.export.scores import prove_scores
from llama_ft.export.table import print_proof
from llama_ft.export.trained import base_folder, check_scale, newest_weights
from llama_ft.files import publish, write_json
from llama_ft.llama.checkpoints.shards import SHARD_BYTES, stored_tensors
from llama_ft.llama.load import DTYPES, load_config
from llama_ft.recipe.run import Run

STAGED = ".merged.new"
REJECTED = "merged.rejected"


class ProofFailed(UserError):
    """The merged model is not what was trained; it was put aside. Exit 2."""

    title = "the export was refused"


@dataclass(frozen=True)
class Export:
    """A finished export: the folder in HF layout, what export.json holds, and whether it was within tolerance."""

    path: Path
    proof: dict[str, Any]
    ok: bool


def export_run(
    run: Run | str | os.PathLike[str],
    *,
    trained: PreTrainedModel | PeftModel | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    low_memory: bool | None = None,
) -> Export:
    """Writes merged/, export.json and the model card of a run, and prints the proof.

    trained: the model as training left it, in memory; then what was saved is also compared with it bit for bit. dtype:
    in place of the recipe's `export.dtype`. shard_bytes: largest weight file. low_memory: whether the proof reads both
    models from disk as it asks them; None: where they exceed what is free (docs/export.md).
    merged/ is complete or absent, and stands there only when the proof passed. Raises ProofFailed (export.json says
    what was measured, the weights are in merged.rejected/), UserError for a run or an adapter that cannot be merged,
    MachineFault when the disk is full.
    """
    options = Options(dtype, shard_bytes, low_memory)
    job = _open(run if isinstance(run, Run) else Run.open(run), trained, options)
    run = job.run
    staged = run.path / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with _quiet_and_exact():
            _write(job, staged)
            proof = (prove_scores if job.reward else prove)(job, staged)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise disk_fault(error, run.merged) from error
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    if not proof["ok"]:
        _reject(run, staged, proof)
    shutil.rmtree(run.path / REJECTED, ignore_errors=True)
    publish(staged, run.merged)
    write_json(run.proof_file, proof)
    write_card(run)
    print_proof(proof, run)
    return Export(run.merged, proof, True)


def _open(run: Run, live: PreTrainedModel | PeftModel | None, options: Options) -> Job:
    """Everything that can be refused before a byte is written."""
    recipe = run.recipe
    method = recipe.adapter.method
    lora = None
    if method != "full":
        if not run.adapter.is_dir():
            hint = "finish it: llama-ft train RECIPE" + (" --resume" if run.steps() else "")
            raise UserError(f"{run.path} has no adapter/: its training did not end", hint=hint)
        lora = read_lora(run.adapter)
        check_scale(lora, recipe)
    prepared = inspect_data(recipe)  # preflight faults were accepted when the run was trained
    saved = run.adapter / "chat_template.jinja"
    if saved.is_file() and saved.read_text(encoding="utf-8") != prepared.template.source:
        raise UserError(
            f"the template '{recipe.template}' is not the one the run was trained with",
            where=str(saved),
            key="template",
            hint="undo the change, or train again",
        )
    dtype = options.dtype or recipe.export.dtype or recipe.model.dtype
    return Job(run, base_folder(run), lora, prepared, dtype, live, options)


def _write(job: Job, staged: Path) -> None:
    """Weights and what goes beside them into `staged`."""
    recipe, dtype = job.run.recipe, DTYPES[job.dtype]
    if job.lora is not None:
        requantise = None
        if recipe.adapter.method == "qlora":
            requantise = requantised(recipe.adapter, job.device, job.compute)
        merge_adapter(
            job.base,
            job.lora,
            staged,
            base_dtype=DTYPES[recipe.model.dtype],
            dtype=dtype,
            requantise=requantise,
            shard_bytes=job.options.shard_bytes,
        )
    elif job.live is not None:
        job.run.merged.rename(staged)  # the trainer has just written it; it comes back when the proof has passed
    else:
        merge_adapter(
            newest_weights(job.run),
            None,
            staged,
            base_dtype=torch.float32,
            dtype=dtype,
            shard_bytes=job.options.shard_bytes,
        )
    config = load_config(job.base, recipe.model.rope_scaling, recipe.sequence.max_length)
    config.vocab_size = stored_tensors(staged)["model.embed_tokens.weight"].shape[0]  # full tuning may have added rows
    sampling = recipe.export.sampling
    write_companions(staged, config, dtype, job.prepared.tokenizer, job.stop, job.reward, sampling)


def _reject(run: Run, staged: Path, proof: dict[str, Any]) -> None:
    """Puts the weights where nobody serves them, says in export.json why, and raises ProofFailed."""
    shutil.rmtree(run.merged, ignore_errors=True)
    publish(staged, run.path / REJECTED)
    write_json(run.proof_file, proof)
    write_card(run)
    print_proof(proof, run)
    place = str(run.proof_file)
    hint = f"the weights are in {REJECTED}/, adapter/ is untouched and chat uses it"
    raise ProofFailed([Problem(fault, place, hint=hint) for fault in proof["faults"]])


@contextmanager
def _quiet_and_exact() -> Iterator[None]:
    """No chatter of the libraries, and float32 products that are float32 (no TF32, no bfloat16 passes)."""
    from transformers.utils import logging

    precision = torch.get_float32_matmul_precision()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what PEFT still calls in transformers is theirs to settle
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if bars:
            logging.enable_progress_bar()
