"""Exported runs to make GGUF files of, and files to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from llama_ft.recipe.run import Run

SCALED = 1.1


def fields(file: Path) -> dict[str, Any]:
    """Every entry of a file."""
    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


def formats_of(run: Run) -> dict[str, Any]:
    """export.json's `formats`."""
    return json.loads(run.proof_file.read_text()).get("formats", {})


def scale(file: Path, name: str, factor: float = SCALED) -> None:
    """Multiplies a tensor of a file: its values, or (q8_0) the scale that each block of 34 bytes begins with."""
    tensor = next(one for one in GGUFReader(file, "r+").tensors if one.name == name)
    if tensor.tensor_type.name == "Q8_0":
        data = tensor.data.reshape(-1, 34)
        data[:, :2] = (data[:, :2].copy().view(np.float16) * np.float16(factor)).view(np.uint8)
    else:
        tensor.data[:] = tensor.data * tensor.data.dtype.type(factor)


def swap(file: Path, left: str, right: str) -> None:
    """Exchanges the bytes of two tensors of one shape."""
    found = {one.name: one.data for one in GGUFReader(file, "r+").tensors}
    kept = found[left].copy()
    found[left][:] = found[right]
    found[right][:] = kept


def rename(file: Path, old: str, new: str) -> None:
    """Another word of the same length in place of an entry's key, or of a text."""
    assert len(old) == len(new)
    data = file.read_bytes()
    assert old.encode() in data
    file.write_bytes(data.replace(old.encode(), new.encode(), 1))


def state(file: Path, key: str, value: Any) -> None:
    """Another value of the same type for an entry."""
    field = GGUFReader(file, "r+").fields[key]
    part = field.parts[field.data[0]]
    part[:] = np.array([value], dtype=part.dtype)
