"""Safetensors files read and written one tensor at a time: an import or a merge needs one tensor's memory, no more.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian length of a JSON header, the
header, then the tensors' bytes end to end. Shapes are known before any value is, so the header can be written first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_ft.errors import UserError

SHARD_BYTES = 5 * 10**9
"""Largest weight file: what hubs and file systems take without complaint."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, how it is shaped, and its type in the format's own word (F32, BF16, F8_E4M3 …)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder (HF layout, sharded or not), without reading any. UserError for a damaged file."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted({folder / name for name in weight_map.values()})
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    found: dict[str, Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as source:
                for name in source.keys():  # noqa: SIM118 (not a dict)
                    entry = source.get_slice(name)
                    found[name] = Stored(file, tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot be read: {error}", where=str(file), hint="fetch the file again") from error
    if not found:
        raise UserError(f"{folder} holds no safetensors", hint="a model folder has model.safetensors")
    return found


def plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Names in order, cut into files of at most `limit` bytes (a larger single tensor gets a file of its own)."""
    shards: list[list[str]] = []
    room = -1
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of all tensors in `dtype`."""
    return sum(map(prod, shapes.values())) * dtype.itemsize


def write_model(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    limit: int = SHARD_BYTES,
) -> list[Path]:
    """Writes tensors as they come, in the order of `shapes`, as `dtype`. Returns the files; several get an index.

    A tensor may come in parts, rows after rows. Raises ValueError when it is not the one that `shapes` announces,
    OSError when the disk refuses.
    """
    shards = plan_shards(shapes, dtype, limit)
    stream = iter(tensors)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = folder / (SINGLE if single else f"model-{number:05}-of-{len(shards):05}.safetensors")
        with file.open("wb") as out:
            out.write(_header({name: shapes[name] for name in names}, dtype))
            for name in names:
                for part in _parts(stream, name, shapes[name]):
                    # A type numpy does not know (bfloat16) goes out as its bytes.
                    out.write(part.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
                weight_map[name] = file.name
        files.append(file)
    if next(stream, None) is not None:  # also lets a generator finish what it does after its last tensor
        raise ValueError(f"more tensors came than the {len(shapes)} announced")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes(shapes, dtype)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _parts(stream: Iterator[tuple[str, Tensor]], expected: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The parts of one tensor, until all of its rows are there."""
    left = shape[0] if shape else 1
    while left:
        name, part = next(stream, ("nothing", torch.empty(0)))
        left -= part.shape[0] if part.dim() else 1
        if name != expected or part.dim() != len(shape) or part.shape[1:] != shape[1:] or left < 0:
            raise ValueError(f"expected {expected} {shape}, got {name} {tuple(part.shape)}")
        yield part


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text
