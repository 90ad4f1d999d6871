"""`export --gguf`: GGUF files of a run's merged model, each proven before it gets its name."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedTokenizerFast

from llama_ft.data.prepare import Prepared, inspect_data
from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.export.card import write_card
from llama_ft.export.gguf.asked import Asked
from llama_ft.export.gguf.child import run_script
from llama_ft.export.gguf.entries import Entries, entries_of
from llama_ft.export.gguf.formats import FORMATS, Format, check_types, file_bytes, stated_types
from llama_ft.export.gguf.modelfile import write_modelfile
from llama_ft.export.gguf.proof import prove_file
from llama_ft.export.gguf.table import print_formats
from llama_ft.export.gguf.tools import VERSION, check_quantiser, converter_folder
from llama_ft.files import flush_to_disk, write_json
from llama_ft.llama.checkpoints.shards import stored_tensors
from llama_ft.recipe.run import Run
from llama_ft.tokenizer.load import load_tokenizer

STAGED = ".gguf.new"
_MARGIN = 64 * 2**20
"""For vocabulary and logs."""
_SOURCES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_RECIPE = "2"
"""Raised when the same weights would give another file, so that older ones are made again."""


class FormatRefused(UserError):
    """A GGUF file is not what was trained; it was put aside. Exit 2."""

    title = "the export was refused"


@dataclass(frozen=True)
class Conversion:
    """One call of :func:`write_ggufs`: the run, what its files must say, and where they are made before they count."""

    run: Run
    entries: Entries
    shapes: dict[str, tuple[int, ...]]
    dtype: str
    made_from: str
    staged: Path
    tokenizer: PreTrainedTokenizerFast
    stop: list[int]

    @property
    def folder(self) -> Path:
        """Where the files come to lie."""
        return self.run.path / "gguf"

    def file(self, kind: Format) -> Path:
        """A file's place and name."""
        return self.folder / f"{self.run.recipe.name}-{kind.name}.gguf"


def write_ggufs(
    run: Run, types: Sequence[str], *, prepared: Prepared | None = None, low_memory: bool | None = None
) -> dict[str, dict[str, Any]]:
    """Writes gguf/NAME-TYPE.gguf of each type and a Modelfile, proves them, and prints the proof.

    Returns what export.json then holds under `formats`: {"gguf/q4_k_m": {…}}. A file that stands, whole, proven and
    made of the same merged/ is left as it is; one that was made of another merged/ is renamed to end in `.outdated`.
    prepared: the recipe's data, if it is at hand. low_memory: whether models are read from disk as they are asked
    (docs/export.md); None: where they exceed what is free.

    Raises UserError for a wrong type, a missing quantiser, a run without a proven merged/ and a reward model;
    FormatRefused when a file is beyond its limits (it then ends in `.rejected`, the others stand); MachineFault when
    the disk is full or one of llama.cpp's tools fails.
    """
    formats = check_types(types)
    check_quantiser(formats)
    job = _open(run, formats)
    _retire(job)
    missing = []
    try:
        for kind in formats:
            proof = standing(job, kind)
            if proof is None:
                missing.append(kind)
            else:
                _note(run, {f"gguf/{kind.name}": proof})
        if missing:
            _make(job, missing, prepared or inspect_data(run.recipe), low_memory)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else str(error)
        hint = "nothing is half-written; mend it and export again"
        raise MachineFault(f"could not write gguf/: {why}", where=str(run.path), hint=hint) from error
    finally:
        shutil.rmtree(job.staged, ignore_errors=True)
    proofs = _note(run, {})
    files = [proof for name, proof in proofs.items() if name.startswith("gguf/") and proof["ok"]]
    write_modelfile(run, files, job.tokenizer, job.stop)
    write_card(run)
    asked = {f"gguf/{kind.name}": proofs[f"gguf/{kind.name}"] for kind in formats}
    print_formats(asked, run)
    refused = [(name, proof) for name, proof in asked.items() if not proof["ok"]]
    if refused:
        place, hint = str(run.proof_file), "the file ends in .rejected; merged/ stands and is what was trained"
        raise FormatRefused([Problem(f"{n}: {fault}", place, hint=hint) for n, p in refused for fault in p["faults"]])
    return asked


def _open(run: Run, formats: Sequence[Format]) -> Conversion:
    """All that can be refused before anything is written."""
    if run.recipe.training.objective == "reward":
        raise UserError("a reward model has no GGUF form: llama.cpp would make a text model of it", where=str(run.path))
    proof = _read_proof(run)
    if not run.merged.is_dir() or not proof.get("ok"):
        hint = f"llama-ft export {run.path}"
        raise UserError(f"{run.path} holds no merged/ whose proof passed", hint=f"make it first: {hint}")
    tokenizer = load_tokenizer(run.merged)
    generation = json.loads((run.merged / "generation_config.json").read_text(encoding="utf-8"))
    stop = generation.get("eos_token_id")
    stop = stop if isinstance(stop, list) else [stop] if stop is not None else []
    entries = entries_of(run.merged, tokenizer, stop, run.recipe.name)
    shapes = {name: stored.shape for name, stored in stored_tensors(run.merged).items()}
    made_from = hash_of(run.merged)
    return Conversion(run, entries, shapes, proof["dtype"], made_from, run.path / STAGED, tokenizer, stop)


def hash_of(merged: Path) -> str:
    """sha256 over the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in merged.iterdir() if path.is_file()):
        digest.update(f"{file.name}\0{_sha256(file)}\0".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _key(job: Conversion, kind: Format) -> str:
    """What a file is made of: the same key gives the same file."""
    said = json.dumps([_RECIPE, VERSION, job.made_from, kind.name, job.entries.values], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def standing(job: Conversion, kind: Format) -> dict[str, Any] | None:
    """The proof of a file that is there, whole, proven, and would come out the same again; None where it is not."""
    file = job.file(kind)
    try:
        noted = json.loads(_beside(file).read_text(encoding="utf-8"))
        whole = noted["key"] == _key(job, kind) and noted["proof"]["sha256"] == _sha256(file)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted["proof"] if whole else None


def _retire(job: Conversion) -> None:
    """Nobody may serve a file of weights that the run no longer has: it loses its name, and its entry with that."""
    for kind in FORMATS.values():
        file = job.file(kind)
        try:
            same = json.loads(_beside(file).read_text(encoding="utf-8"))["key"] == _key(job, kind)
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same and file.is_file():
            _beside(file).unlink(missing_ok=True)
            file.replace(file.with_name(f"{file.name}.outdated"))


def _make(job: Conversion, formats: list[Format], prepared: Prepared, low_memory: bool | None) -> None:
    """Makes and proves what is missing; each file gets its name, and its entry, as soon as it is proven."""
    shutil.rmtree(job.staged, ignore_errors=True)
    _check_space(job, formats)
    converter = converter_folder()
    job.staged.mkdir(parents=True)
    asked = Asked.of(job.run.merged, job.tokenizer, prepared, low_memory=low_memory)
    source: Path | None = None
    # The type that the quantiser reads goes first, so that it need not be made twice.
    for kind in sorted(formats, key=lambda one: (one.name != _SOURCES[job.dtype], not one.by_converter)):
        if kind.by_converter:
            made = _convert(job, kind, converter)
        else:
            source = source or _source(job, converter)
            made = _quantise(job, kind, source)
        print(f"proving {made.name}", file=sys.stderr, flush=True)
        proof = prove_file(made, kind, asked, job.entries, job.staged)
        _note(job.run, {f"gguf/{kind.name}": _publish(job, kind, made, proof)})


def _source(job: Conversion, converter: Path) -> Path:
    """A file without any rounding for the quantiser to read; one that stands anyway serves."""
    kind = FORMATS[_SOURCES[job.dtype]]
    return job.file(kind) if standing(job, kind) is not None else _convert(job, kind, converter)


def _convert(job: Conversion, kind: Format, converter: Path) -> Path:
    out = job.staged / job.file(kind).name
    task = {
        "model": str(job.run.merged),
        "out": str(out),
        "type": kind.name,
        "name": job.run.recipe.name,
        "keys": job.entries.methods,
        "pre": job.entries.pre,
    }
    size = file_bytes(job.shapes, kind)
    run_script("convert", task, job.staged, what=f"writing {out.name}", first_on_path=converter, grows=out, to=size)
    return out


def _quantise(job: Conversion, kind: Format, source: Path) -> Path:
    out = job.staged / job.file(kind).name
    task = {
        "source": str(source),
        "out": str(out),
        "type": kind.name,
        "stated": [(name, GGMLQuantizationType[stated].value) for name, stated in stated_types(job.shapes, kind)],
        "threads": torch.get_num_threads(),
    }
    size = file_bytes(job.shapes, kind)
    run_script("quantise", task, job.staged, what=f"writing {out.name}", grows=out, to=size)
    return out


def _publish(job: Conversion, kind: Format, made: Path, proof: dict[str, Any]) -> dict[str, Any]:
    """Gives a proven file its name, a refused one that of a rejected one."""
    final = job.file(kind)
    rejected, outdated = (final.with_name(f"{final.name}.{end}") for end in ("rejected", "outdated"))
    digest = _sha256(made)
    job.folder.mkdir(exist_ok=True)
    for old in (rejected, _beside(final), *((outdated,) if proof["ok"] else (final,))):
        old.unlink(missing_ok=True)
    place = final if proof["ok"] else rejected
    flush_to_disk(made)
    made.replace(place)
    flush_to_disk(job.folder)
    entry = {"file": place.relative_to(job.run.path).as_posix(), "type": kind.name, "sha256": digest, **proof}
    if proof["ok"]:
        write_json(_beside(final), {"key": _key(job, kind), "converter": VERSION, "proof": entry})
    return entry


def _check_space(job: Conversion, formats: list[Format]) -> None:
    source = FORMATS[_SOURCES[job.dtype]]
    kinds = set(formats) | ({source} if any(not kind.by_converter for kind in formats) else set())
    need = sum(file_bytes(job.shapes, kind) + _MARGIN for kind in kinds)
    free = shutil.disk_usage(job.run.path).free
    if free < need:
        raise MachineFault(
            f"the GGUF files need {need / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free",
            where=str(job.run.path),
            hint="free some space, or ask for fewer types; nothing was written",
        )


def _read_proof(run: Run) -> dict[str, Any]:
    try:
        return json.loads(run.proof_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _note(run: Run, new: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Puts entries into export.json's `formats`, the most exact first; those whose file somebody removed go."""
    proof = _read_proof(run)
    found = {**proof.get("formats", {}), **new}
    order = [f"gguf/{name}" for name in FORMATS]
    names = [*(name for name in found if name not in order), *(name for name in order if name in found)]
    kept = {name: found[name] for name in names if name not in order or (run.path / found[name]["file"]).is_file()}
    write_json(run.proof_file, proof | {"formats": kept})
    return kept
