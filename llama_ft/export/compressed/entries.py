"""What lies beside the weights of a compressed checkpoint, and what its config says: put there, and checked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_ft.adapters.quantised import is_projection
from llama_ft.export.compressed.types import IGNORED, Compression
from llama_ft.files import write_json
from llama_ft.llama.checkpoints.shards import Stored, stored_tensors

CONFIG = "config.json"
_QUANTISATION = "quantization_config"
_SHOWN = 3
_PACKED = {"I32": "weight_packed"}


def companions(merged: Path) -> list[Path]:
    """What merged/ holds besides weights and config: tokenizer, template, generation_config."""
    files = (file for file in sorted(merged.iterdir()) if file.is_file())
    return [file for file in files if file.name != CONFIG and not _is_weights(file)]


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")


def settle(folder: Path, merged: Path, dtype: str) -> None:
    """Leaves of what llm-compressor wrote its weights and what it says about them; all else is what merged/ has."""
    said = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(_QUANTISATION)
    for file in folder.iterdir():
        if not _is_weights(file):
            file.unlink()
    for file in companions(merged):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((merged / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, config | {"dtype": dtype, _QUANTISATION: said})
    for file in folder.iterdir():  # weights come readable by their owner alone
        shutil.copymode(merged / CONFIG, file)


def entry_faults(folder: Path, merged: Path, kind: Compression, group: int, dtype: str) -> list[str]:
    """Where a checkpoint says something else than it must; empty = nowhere."""
    faults = []
    for file in companions(merged):
        own = folder / file.name
        if not own.is_file():
            faults.append(f"{file.name} is missing")
        elif own.read_bytes() != file.read_bytes():
            faults.append(f"{file.name} is another one than in merged/")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    wanted = json.loads((merged / CONFIG).read_text(encoding="utf-8")) | {"dtype": dtype}
    for key in sorted((config.keys() | wanted.keys()) - {_QUANTISATION}):
        if config.get(key) != wanted.get(key):
            faults.append(f"{CONFIG}: {key} is {config.get(key)!r}, not {wanted.get(key)!r}")
    faults += _quantisation_faults(config.get(_QUANTISATION), kind.scheme(group))
    return faults + _tensor_faults(stored_tensors(folder), stored_tensors(merged), kind)


def _quantisation_faults(said: Any, scheme: dict[str, Any]) -> list[str]:
    """Where a config does not say what was asked of llm-compressor."""
    if not isinstance(said, dict):
        return [f"{CONFIG} has no {_QUANTISATION}: its weights would be read as they are"]
    wanted = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "kv_cache_scheme": None}
    faults = [
        f"{_QUANTISATION}: {key} is {said.get(key)!r}, not {value!r}"
        for key, value in wanted.items()
        if said.get(key) != value
    ]
    if sorted(said.get("ignore") or []) != sorted(IGNORED):
        faults.append(f"{_QUANTISATION}: ignore is {said.get('ignore')}, not {list(IGNORED)}")
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        return [*faults, f"{_QUANTISATION}: config_groups is not the one group that was asked for"]
    (found,) = groups.values()
    if found.get("targets") != ["Linear"]:
        faults.append(f"{_QUANTISATION}: targets is {found.get('targets')}, not ['Linear']")
    for part in ("weights", "input_activations", "output_activations"):
        asked, own = scheme.get(part), found.get(part)
        if asked is None or own is None:
            if asked is not own:
                faults.append(f"{_QUANTISATION}: {part} is {own!r}, not {asked!r}")
            continue
        faults += [
            f"{_QUANTISATION}: {part}.{key} is {own.get(key)!r}, not {value!r}"
            for key, value in asked.items()
            if own.get(key) != value
        ]
    return faults


def _tensor_faults(found: Mapping[str, Stored], merged: Mapping[str, Stored], kind: Compression) -> list[str]:
    """Projections that are stored as something else than the type's numbers, and other tensors that are gone."""
    faults = []
    for name in merged:
        rounded = is_projection(name)
        own = name.removesuffix("weight") + _PACKED.get(kind.stored, "weight") if rounded else name
        if own not in found:
            faults.append(f"{own} is missing")
        elif rounded and found[own].dtype != kind.stored:
            faults.append(f"{own} is stored as {found[own].dtype}, not {kind.stored}")
        elif not rounded and found[own].dtype not in ("BF16", "F16"):
            faults.append(f"{own} is stored as {found[own].dtype}, not in 16 bits")
    return faults[:_SHOWN]
