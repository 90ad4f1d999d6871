"""`export --compressed`: checkpoints in the compressed-tensors format, for vLLM, each proven before it counts."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from llama_ft.adapters.quantised import is_projection
from llama_ft.data.prepare import Prepared, inspect_data
from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.export.card import write_card
from llama_ft.export.compressed.calibrate import choose_rows
from llama_ft.export.compressed.entries import settle
from llama_ft.export.compressed.proof import prove_checkpoint
from llama_ft.export.compressed.runtime import SCRIPTS
from llama_ft.export.compressed.shelf import (
    FOLDER,
    Work,
    note,
    publish_checkpoint,
    read_proof,
    retire,
    settings,
    standing,
)
from llama_ft.export.compressed.tools import compressor_folder, environment
from llama_ft.export.compressed.types import IGNORED, Compression, check_types, compressed_bytes, group_size
from llama_ft.export.gguf.asked import Asked
from llama_ft.export.gguf.child import run_script
from llama_ft.export.gguf.table import print_formats
from llama_ft.export.gguf.write import hash_of
from llama_ft.export.trained import base_folder
from llama_ft.llama.checkpoints.shards import SHARD_BYTES, stored_tensors
from llama_ft.llama.load import load_config
from llama_ft.recipe.run import Run
from llama_ft.tokenizer.load import load_tokenizer

_MARGIN = 64 * 2**20
"""For tokenizer and logs."""
_MEMORY = 1.3
"""What llm-compressor takes beside a model's weights in 16 bits, as a factor: an estimate, which spares a long wait."""
_STAGE = re.compile(r"\((\d+)/(\d+)\): (Calibrating|Propagating)")


class CompressedRefused(UserError):
    """A compressed checkpoint is too far from the merged model; it was put aside. Exit 2."""

    title = "the export was refused"


def check_compressed(run: Run, kinds: Sequence[Compression]) -> None:
    """All that can be refused before anything is merged; installs llm-compressor where it is missing.

    UserError for a reward model and for rows that no group divides, MachineFault where llm-compressor cannot be had.
    """
    if kinds:
        _check_objective(run)
        config = load_config(base_folder(run))
        heads = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        group_size([config.hidden_size, config.intermediate_size, heads], kinds)
        compressor_folder()


def _check_objective(run: Run) -> None:
    if run.recipe.training.objective == "reward":
        what = "a reward model has no compressed form: what is proven here are answers, and it writes none"
        raise UserError(what, where=str(run.path))


def write_compressed(
    run: Run, types: Sequence[str], *, prepared: Prepared | None = None, low_memory: bool | None = None
) -> dict[str, dict[str, Any]]:
    """Writes compressed/TYPE/ of each type, proves them, and prints the proof.

    Returns what export.json then holds under `formats`: {"compressed/awq": {…}}. A checkpoint that stands, whole,
    proven and made of the same merged/ and documents is left as it is; one made of others is renamed to end in
    `.outdated`. prepared: the recipe's data, if it is at hand. low_memory: whether the proof reads models from disk as
    it asks them (docs/export.md); None: where they exceed what is free.

    Raises UserError as :func:`check_compressed` does, and for a wrong type and a run without a proven merged/;
    CompressedRefused when a checkpoint is beyond its limits (it then ends in `.rejected`, the others stand);
    MachineFault when disk or memory is short or llm-compressor fails.
    """
    kinds = check_types(types)
    work = _open(run, kinds, prepared)
    try:
        retire(work)
        stand = {kind.name: standing(work, kind) for kind in kinds}
        note(run, {f"{FOLDER}/{name}": proof for name, proof in stand.items() if proof is not None})
        if missing := [kind for kind in kinds if stand[kind.name] is None]:
            _make(work, missing, low_memory)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else str(error)
        hint = "nothing is half-written; mend it and export again"
        raise MachineFault(f"could not write {FOLDER}/: {why}", where=str(run.path), hint=hint) from error
    finally:
        shutil.rmtree(work.staged, ignore_errors=True)
    noted = note(run, {})
    write_card(run)
    asked = {f"{FOLDER}/{kind.name}": noted[f"{FOLDER}/{kind.name}"] for kind in kinds}
    print_formats(asked, run, what="compressed checkpoints", folder=FOLDER)
    refused = [(name, proof) for name, proof in asked.items() if not proof["ok"]]
    if refused:
        place, hint = str(run.proof_file), "the folder ends in .rejected; merged/ stands and is what was trained"
        raise CompressedRefused([Problem(f"{n}: {f}", place, hint=hint) for n, p in refused for f in p["faults"]])
    return asked


def _open(run: Run, kinds: Sequence[Compression], prepared: Prepared | None) -> Work:
    """All that can be refused before anything is written."""
    _check_objective(run)
    proof = read_proof(run)
    if not run.merged.is_dir() or not proof.get("ok"):
        hint = f"make it first: llama-ft export {run.path}"
        raise UserError(f"{run.path} holds no merged/ whose proof passed", hint=hint)
    shapes = {name: stored.shape for name, stored in stored_tensors(run.merged).items()}
    group = group_size([shape[-1] for name, shape in shapes.items() if is_projection(name)], kinds)
    dtype = "float16" if proof["dtype"] == "float16" else "bfloat16"
    prepared = prepared or inspect_data(run.recipe)
    rows = choose_rows(prepared) if any(kind.calibrated for kind in kinds) else []
    return Work(run, shapes, group, dtype, rows, hash_of(run.merged), load_tokenizer(run.merged), prepared)


def _make(work: Work, kinds: list[Compression], low_memory: bool | None) -> None:
    """Makes and proves what is missing; each checkpoint gets its name, and its entry, as soon as it is proven."""
    shutil.rmtree(work.staged, ignore_errors=True)
    _check_room(work, kinds)
    work.staged.mkdir(parents=True)
    path = environment(work.staged)
    rows = work.staged / "rows.json"
    rows.write_text(json.dumps(work.rows), encoding="utf-8")
    if any(kind.grouped for kind in kinds):
        print(f"one scale for each {work.group} weights of a row", file=sys.stderr, flush=True)
    asked: Asked | None = None
    for kind in kinds:
        made = _compress(work, kind, rows, path)
        asked = asked or Asked.of(work.run.merged, work.tokenizer, work.prepared, low_memory=low_memory)
        print(f"proving {kind.name}", file=sys.stderr, flush=True)
        proof = prove_checkpoint(made, kind, work.group, work.dtype, asked, work.staged, path)
        shutil.rmtree(work.staged / "plain", ignore_errors=True)
        entry = publish_checkpoint(work, kind, made, {**proof, "made_by": settings(work, kind)})
        note(work.run, {f"{FOLDER}/{kind.name}": entry})


def _compress(work: Work, kind: Compression, rows: Path, path: Sequence[Path]) -> Path:
    out = work.staged / kind.name
    task = {
        "model": str(work.run.merged),
        "out": str(out),
        "dtype": work.dtype,
        "method": kind.method,
        "scheme": kind.scheme(work.group),
        "ignore": list(IGNORED),
        "rows": str(rows) if kind.calibrated else None,
        "shard_bytes": SHARD_BYTES,
        "threads": torch.get_num_threads(),
    }
    what = f"compressing to {kind.name}"
    seen = f" on {len(work.rows)} documents, {sum(map(len, work.rows))} tokens" if kind.calibrated else ""
    print(f"{what}{seen}", file=sys.stderr, flush=True)
    run_script("compress", task, work.staged, what=what, scripts=SCRIPTS, alone_with=path, stage=stage)
    settle(out, work.run.merged, work.dtype)
    return out


def stage(log: Path) -> str | None:
    """How far llm-compressor's log says it is: which part of the model the documents go through."""
    with log.open("rb") as opened:
        opened.seek(max(0, log.stat().st_size - 4096))
        found = _STAGE.findall(opened.read().decode("utf-8", errors="replace"))
    return f"part {found[-1][0]} of {found[-1][1]}" if found else None


def _check_room(work: Work, kinds: Sequence[Compression]) -> None:
    """MachineFault where disk or memory will not do; nothing was written then."""
    values = sum(map(prod, work.shapes.values()))
    need = sum(compressed_bytes(work.shapes, kind, work.group) + _MARGIN for kind in kinds) + 2 * values
    for free, wanted, what, do in (
        (shutil.disk_usage(work.run.path).free, need, "GiB on the disk", "free some, or ask for fewer types"),
        (psutil.virtual_memory().available, int(2 * values * _MEMORY), "GiB of memory", "take a larger machine"),
    ):
        if free < wanted:
            said = f"compressing needs {wanted / 2**30:.2f} {what} and {free / 2**30:.2f} are free"
            raise MachineFault(said, where=str(work.run.path), hint=f"{do}; nothing was written")
