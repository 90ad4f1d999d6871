"""Checkpoints in: recognises what a source is, checks it, and writes it as an HF folder, whole or not at all.

Formats: HF safetensors (hf), Meta's consolidated.NN.pth (meta), llama2.c's .bin (llama2c), GGUF (gguf). Each reader
checks names, shapes and sizes before a value is read; values go from the source's file to the new one tensor by tensor.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_ft.errors import MachineFault, Problem, UserError, did_you_mean
from llama_ft.files import publish
from llama_ft.llama.checkpoints.layout import DTYPES, Weights, file_problem
from llama_ft.llama.checkpoints.progress import with_progress
from llama_ft.llama.checkpoints.shards import SHARD_BYTES, total_bytes, write_model

FORMATS = "HF safetensors, Meta's consolidated.NN.pth with params.json, llama2.c's .bin, GGUF"
_CHUNK = 1 << 24
_ZIP, _PICKLE, _GGUF = b"PK\x03\x04", b"\x80", b"GGUF"
_LLAMA_3_ENDS = [128_001, 128_008, 128_009]
"""End of text, of message and of turn in LLaMA 3's vocabulary: a chat model writes the last, a base model the first."""


@dataclass(frozen=True)
class Imported:
    """What an import wrote: `path` (HF layout), from what `kind` of source, the `tokenizer`'s file or None."""

    path: Path
    kind: str
    tensors: int
    bytes: int
    dtype: str
    context: int
    tokenizer: Path | None
    notices: tuple[str, ...]


def import_checkpoint(
    source: Path, dest: Path, *, dtype: str | None = None, overwrite: bool = False, weights: bool = True
) -> Imported:
    """Writes `source` into the folder `dest` in HF's layout: config, generation config, tokenizer, safetensors.

    dtype: float32, bfloat16 or float16; None keeps the stored type (float32 for quantised values, which no shorter type
    holds exactly). overwrite: replaces a model folder of that name. weights False leaves the safetensors out. Peak
    memory is a few times the largest tensor. `dest` is complete afterwards or as it was before.

    Raises UserError with everything that is wrong with the source, MachineFault when the disk refuses.
    """
    source, dest = source.expanduser().resolve(), dest.expanduser().resolve()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"no such type '{dtype}'", hint=did_you_mean(dtype, DTYPES, kind="types"))
    check_dest(source, dest, overwrite=overwrite)
    return write_checkpoint(open_checkpoint(source), source, dest, dtype=dtype, overwrite=overwrite, weights=weights)


def write_checkpoint(
    checked: Weights,
    source: Path,
    dest: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    weights: bool = True,
    doing: str = "importing",
) -> Imported:
    """Writes an opened checkpoint, which came from `source`; `doing` is said of it, the rest: `import_checkpoint`."""
    chosen = DTYPES[dtype] if dtype else checked.dtype
    size = total_bytes(checked.shapes, chosen) if weights else 0
    try:
        _check_space(dest.parent, size)
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}-") as aside:
            made = Path(aside, "model")
            made.mkdir()
            _write_config(checked, made, chosen)  # the tokenizer takes its length from it,
            tokenizer = checked.tokenizer(made)
            _write_config(checked, made, chosen)  # and may settle which token is padding
            if weights:
                stream = with_progress(_values(checked, chosen), size, f"{doing} {source.name}")
                write_model(made, checked.shapes, chosen, stream, SHARD_BYTES)
            check_dest(source, dest, overwrite=overwrite)  # an import takes long: what is there by now?
            publish(made, dest)
    except OSError as error:
        raise _disk_fault(error, dest) from error
    name = str(chosen).removeprefix("torch.")
    notices = checked.notices
    if tokenizer is None:
        notices += ("no tokenizer was found beside the weights: name one in model.tokenizer",)
    context = int(checked.config.get("max_position_embeddings") or 0)
    return Imported(dest, checked.kind, len(checked.shapes), size, name, context, tokenizer, notices)


def import_named(source: str, dest: Path, *, dtype: str | None = None, overwrite: bool = False) -> Imported:
    """The command: `source` is a file, a folder, `smollm2-135m` or a hub id; tells on stdout what was written."""
    from llama_ft.llama.base import locate_base

    path = Path(source).expanduser()
    meant_as_path = path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    done = import_checkpoint(path if meant_as_path else locate_base(source), dest, dtype=dtype, overwrite=overwrite)
    print(f"{done.path}: {done.kind}, {done.tensors} tensors, {done.dtype}, {done.bytes / 10**9:.2f} GB")
    if done.tokenizer is not None:
        print(f"tokenizer: {done.tokenizer}")
    for notice in done.notices:
        print(f"note: {notice}")
    return done


def open_checkpoint(source: Path) -> Weights:
    """Recognises a source by what is in it, and checks it. UserError when it is nothing that can be read."""
    if source.is_dir():
        return _open_folder(source)
    if not source.exists():
        beside = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
        hint = did_you_mean(source.name, beside, kind="names there") if beside else "check the path"
        raise UserError(f"there is no file or folder {source}", hint=hint)
    problem = file_problem(source)
    if problem:
        raise UserError([problem])
    with source.open("rb") as file:
        head = file.read(8)
    suffix = source.suffix.lower()
    if head.startswith(_GGUF) or suffix == ".gguf":
        from llama_ft.llama.checkpoints.gguf import open_gguf

        return open_gguf(source)
    if suffix == ".safetensors" or source.name in ("config.json", "model.safetensors.index.json"):
        return _open_folder(source.parent)
    if head.startswith((_ZIP, _PICKLE)) or suffix in (".pth", ".pt"):
        from llama_ft.llama.checkpoints.meta import open_meta

        return open_meta(source)
    if suffix == ".bin":
        from llama_ft.llama.checkpoints.llama2c import open_llama2c

        return open_llama2c(source)
    raise UserError("is no checkpoint that can be read", where=str(source), hint=f"formats: {FORMATS}")


def _open_folder(folder: Path) -> Weights:
    if (folder / "config.json").exists():
        from llama_ft.llama.checkpoints.hf import open_hf

        return open_hf(folder)
    if any(folder.glob("consolidated*.pth")):
        from llama_ft.llama.checkpoints.meta import open_meta

        return open_meta(folder)
    names = sorted(path.name for path in folder.iterdir())
    what = f"holds no checkpoint that can be read (found: {', '.join(names[:8]) or 'nothing'})"
    alone = [name for name in names if name.endswith((".gguf", ".bin", ".pth", ".pt"))]
    if any(name.endswith(".safetensors") for name in names):
        hint = "config.json is missing: fetch it from where the weights came from"
    elif "params.json" in names and not alone:
        hint = "consolidated.NN.pth is missing beside params.json"
    else:
        hint = f"name the file: {folder / alone[0]}" if alone else f"formats: {FORMATS}"
    raise UserError(what, where=str(folder), hint=hint)


def check_dest(source: Path, dest: Path, *, overwrite: bool) -> None:
    """A folder is never mixed with another, and only a model folder is ever replaced. UserError where it would be."""
    if not dest.exists():
        return
    if not dest.is_dir():
        raise UserError(f"{dest} is a file, a folder is needed", hint="name another folder")
    if not any(dest.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{dest} exists and is not empty", hint="name another folder, or add --overwrite")
    if source == dest or dest in source.parents:
        raise UserError(f"{dest} holds the source itself", hint="name another folder")
    config = dest / "config.json"
    if (dest / ".git").exists() or not config.is_file() or '"model_type"' not in config.read_text(errors="replace"):
        raise UserError(f"{dest} is no model folder, it will not be replaced", hint="name another folder")


def _write_config(checked: Weights, folder: Path, dtype: torch.dtype) -> None:
    """config.json and generation_config.json; an HF source keeps its own entries, but for the type."""
    from transformers import GenerationConfig, LlamaConfig

    for path in checked.companions:
        shutil.copyfile(path, folder / path.name)
    if checked.kind.startswith("HF"):
        from llama_ft.files import write_json

        stated = {key: value for key, value in checked.config.items() if key != "torch_dtype"}
        write_json(folder / "config.json", stated | {"dtype": str(dtype).removeprefix("torch.")})
        return
    config: Any = LlamaConfig(**checked.config)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.save_pretrained(folder)
    ends = {key: checked.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if ends["eos_token_id"] == _LLAMA_3_ENDS[0]:
        ends["eos_token_id"] = _LLAMA_3_ENDS
    GenerationConfig(**ends).save_pretrained(folder)


def _values(checked: Weights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in `dtype`, refused by name when a value is not finite or does not fit into the type."""
    for name in checked.shapes:
        stored = checked.read(name)
        tensor = stored.to(dtype)
        if not _finite(tensor):
            if _finite(stored):
                kind = str(dtype).removeprefix("torch.")
                what, hint = f"{name} has values that {kind} cannot hold", "take --dtype bfloat16 or float32"
            else:
                what, hint = f"{name} has values that are not finite", "the file is damaged, or its training failed"
            raise UserError([Problem(what, str(checked.where), hint=hint)])
        yield name, tensor


def _finite(tensor: Tensor) -> bool:
    """Chunk by chunk: a whole embedding's worth of booleans would be as large as many a model."""
    return all(bool(torch.isfinite(chunk).all()) for chunk in tensor.reshape(-1).split(_CHUNK))


def _check_space(folder: Path, size: int) -> None:
    need = size + 32 * 2**20  # a margin for the small files
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        what = f"the model needs {need / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free"
        raise MachineFault(
            what, where=str(folder), hint="free some space, or take --dtype bfloat16; nothing was written"
        )


def _disk_fault(error: OSError, dest: Path) -> MachineFault:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    why = "the disk is full" if full else str(error)
    return MachineFault(
        f"could not write {dest.name}: {why}",
        where=str(dest.parent),
        hint="nothing is half-written; mend it and import again",
    )
