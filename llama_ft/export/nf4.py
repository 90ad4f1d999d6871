"""`export --nf4`: a checkpoint in bitsandbytes' 4 bits that transformers opens as it is, a quarter of 16 bits' size.

merged/ is quantised by transformers and bitsandbytes themselves (NF4 with double quantisation, arXiv 2305.14314), read
back, and asked what merged/ was asked, with the weights that its 4 bits stand for.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaForCausalLM

from llama_ft.adapters.merge import check_space, disk_fault
from llama_ft.adapters.quantised import BLOCK, bitsandbytes, digest, is_projection, without_quantisation
from llama_ft.data.prepare import Prepared, inspect_data
from llama_ft.errors import Problem, UserError
from llama_ft.export.gguf.asked import Asked
from llama_ft.export.gguf.weights import distance
from llama_ft.export.job import finite
from llama_ft.export.kept import Kept
from llama_ft.export.proof import observe, pick_device
from llama_ft.export.tolerance import Tolerance, judge
from llama_ft.files import publish, write_json
from llama_ft.llama.checkpoints.shards import stored_tensors
from llama_ft.llama.load import load_config, quiet_transformers
from llama_ft.recipe.run import Run
from llama_ft.tokenizer.load import load_tokenizer

FOLDER = "nf4"
STAGED = ".nf4.new"
TOLERANCE = Tolerance(max_delta=None, mean_kl=0.5, top1=None, greedy="near ties")
"""SmolLM2-135M, of which 4 bits take more than of a model of billions of weights, measures 0.24 nats after the
quickstart (docs/export.md). What is wrong with a single tensor shows in its weights."""
ERROR = 0.12
"""Largest ‖Ŵ − W‖ / ‖W‖ of a quantised weight: NF4 of normally distributed ones takes 0.09 to 0.1."""


class Nf4Refused(UserError):
    """The 4-bit checkpoint is too far from the merged model; it was not kept. Exit 2."""

    title = "the export was refused"


def check_nf4(run: Run) -> None:
    """UserError where the checkpoint cannot be made: a reward model, no bitsandbytes, rows that do not fit."""
    if run.recipe.training.objective == "reward":
        raise UserError(f"{run.path} is a reward model; its scores are not kept in 4 bits")
    bitsandbytes()
    if (run.merged / "config.json").is_file() and not torch.cuda.is_available():
        config = load_config(run.merged)
        odd = [rows for rows in (config.hidden_size, config.intermediate_size) if rows % BLOCK]
        if odd:
            what = f"on a CPU NF4 needs rows of a multiple of {BLOCK} weights, the model has rows of {odd[0]}"
            raise UserError(what, hint="export it on a machine with a GPU")


def write_nf4(run: Run, *, prepared: Prepared | None = None) -> dict[str, Any]:
    """Writes nf4/, complete or absent, and puts its proof into export.json under `formats`. Returns that proof.

    Raises UserError as :func:`check_nf4` does, Nf4Refused beyond the tolerance, MachineFault for a full disk.
    """
    if not (run.merged / "config.json").is_file():
        raise UserError(f"{run.path} has no merged/ to quantise", hint=f"llama-ft export {run.path}")
    check_nf4(run)
    size = sum(file.stat().st_size for file in run.merged.glob("*.safetensors"))
    check_space(run.path, size // 2)
    staged = run.path / STAGED
    shutil.rmtree(staged, ignore_errors=True)
    try:
        before = _quantise(run.merged, staged)
        tokenizer = load_tokenizer(run.merged)
        tokenizer.save_pretrained(staged)
        proof = _prove(run, staged, before, Asked.of(run.merged, tokenizer, prepared or inspect_data(run.recipe)))
        if proof["ok"]:
            publish(staged, run.path / FOLDER)
    except OSError as error:
        raise disk_fault(error, run.path / FOLDER) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    whole = _read(run)
    write_json(run.proof_file, whole | {"formats": {FOLDER: proof, **_without(whole.get("formats", {}))}})
    if not proof["ok"]:
        shutil.rmtree(run.path / FOLDER, ignore_errors=True)
        hint = None
        if run.recipe.adapter.method == "qlora":
            hint = "a QLoRA is served in 4 bits as it was trained: the base in NF4 and adapter/ beside it"
        raise Nf4Refused([Problem(f"nf4: {fault}", str(run.proof_file), hint=hint) for fault in proof["faults"]])
    return proof


def _quantise(merged: Path, out: Path) -> str:
    """Writes the checkpoint; returns the fingerprint of its 4-bit weights in memory."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet_transformers():
        model: Any = LlamaForCausalLM.from_pretrained(
            merged, quantization_config=settings, dtype=torch.bfloat16, local_files_only=True
        )
        model.generation_config = GenerationConfig.from_pretrained(merged)
        model.save_pretrained(out)
    return digest(model)


def _prove(run: Run, staged: Path, before: str, asked: Asked) -> dict[str, Any]:
    with quiet_transformers():
        model: Any = LlamaForCausalLM.from_pretrained(staged, local_files_only=True)
    faults = [] if digest(model) == before else ["read back, its 4-bit weights are others than were written"]
    without_quantisation(model)
    kept = Kept.of(run.merged)
    faults += _weight_faults(model, run.merged, kept)
    nn.Module.float(model)  # transformers' own refuses for a model that was quantised
    model.generation_config = GenerationConfig.from_pretrained(staged)
    seen = observe(model.to(pick_device(model)), asked.documents, [prompt.ids for prompt in asked.prompts])
    measured, greedy = asked.compare(seen)
    faults += judge(TOLERANCE, measured, greedy)
    return {
        "ok": not faults,
        "faults": faults,
        "bytes": sum(file.stat().st_size for file in staged.glob("*.safetensors")),
        "computed_in": "float32, weights as its 4 bits stand for",
        "tolerance": asdict(TOLERANCE),
        "measured": {key: finite(value) for key, value in measured.items()},
        "learnt_kept": finite(kept.share) if kept is not None else None,
        "greedy": greedy,
        "opened_with": f"transformers {transformers.__version__} LlamaForCausalLM, bitsandbytes",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _weight_faults(model: nn.Module, merged: Path, kept: Kept | None) -> list[str]:
    """Which projection is farther from merged/ than its 4 bits take it, and whether what was learnt is still there."""
    stored, faults = stored_tensors(merged), []
    for name, weight in model.named_parameters():
        if is_projection(name):
            with safe_open(stored[name].file, framework="pt") as source:
                right = source.get_tensor(name)
            error, _ = distance(right, weight)
            if kept is not None:
                kept.add(name, right, weight)
            if not error <= ERROR:
                faults.append(f"{name}: ‖Ŵ − W‖ / ‖W‖ is {error:.3g}, allowed {ERROR:g}")
    return faults + (kept.faults() if kept is not None else [])


def _read(run: Run) -> dict[str, Any]:
    try:
        return json.loads(run.proof_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _without(formats: dict[str, Any]) -> dict[str, Any]:
    return {name: proof for name, proof in formats.items() if name != FOLDER}
