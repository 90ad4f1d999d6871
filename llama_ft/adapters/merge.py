"""The merge: W ← W + s·B·A (LoRA, arXiv 2106.09685), tensor by tensor from the base's files to the merged ones.

W is the weight the adapter was trained on: the base's, rounded to the recipe's dtype. The sum is made in float32 and
rounded once, to the export's dtype. Whatever this formula does not cover (DoRA, trained biases, other bases) is refused
by name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.files import publish
from llama_ft.llama.checkpoints.shards import SHARD_BYTES, Stored, stored_tensors, total_bytes, write_model

# What may be said in adapter_config.json without changing the formula. Every other entry must be empty: a variant that
# a later PEFT invents is refused too, instead of being merged as if it were plain LoRA.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
_PLAIN = {"bias": "none", "init_lora_weights": (True, False, "gaussian")}
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_SHOWN = 4


@dataclass(frozen=True)
class LoraFile:
    """A saved LoRA: factors by the base weight they belong to, A [r, in] and B [out, r] in float32."""

    path: Path
    scale: float
    targets: tuple[str, ...]
    factors: dict[str, tuple[Tensor, Tensor]]
    sha256: str

    @property
    def tensors(self) -> int:
        """How many tensors the file holds."""
        return 2 * len(self.factors)


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    path: Path
    tensors: int
    adapted: int
    bytes: int


def read_lora(folder: Path) -> LoraFile:
    """Reads an adapter folder in PEFT's layout. UserError naming everything that keeps it from being merged."""
    config = _config(folder)
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no adapter_model.safetensors", hint="pickled adapters are not read; save it again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"the adapter cannot be read: {error}", where=str(file)) from error
    sides: dict[str, dict[str, Tensor]] = {}
    odd = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            odd.append(key)
        else:
            sides.setdefault(f"{match['module']}.weight", {})[match["side"]] = tensor.float()
    problems = [Problem(f"{key} is not a LoRA factor of a linear layer", str(file)) for key in sorted(odd)[:_SHOWN]]
    for name, pair in sides.items():
        if len(pair) == 1:
            problems.append(Problem(f"{name} has lora_{next(iter(pair))} but not its partner", str(file)))
        elif pair["A"].shape[0] != config["r"] or pair["B"].shape[1] != config["r"]:
            found = f"A {list(pair['A'].shape)}, B {list(pair['B'].shape)}"
            problems.append(Problem(f"{name} has {found}, which is not rank {config['r']}", str(file)))
    if not problems:
        problems = _zero_problems({name: pair["B"] for name, pair in sides.items()}, file)
    if problems:
        raise UserError(problems)
    r, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r  # rsLoRA: arXiv 2312.03732
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    factors = {name: (pair["A"], pair["B"]) for name, pair in sorted(sides.items())}
    return LoraFile(folder, scale, tuple(config["target_modules"]), factors, digest)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable adapter_config.json: {error}", hint="is it an adapter?") from error
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(Problem(f"found a '{config.get('peft_type')}' adapter, only LORA can be merged", str(path)))
    for key, value in config.items():
        if key in _PLAIN:
            plain = _PLAIN[key]
            unusual = value not in plain if isinstance(plain, tuple) else value != plain
        else:
            unusual = key not in _HARMLESS and bool(value)
        if unusual:
            what = f"{key} is {json.dumps(value)}: this variant of LoRA cannot be merged here"
            problems.append(Problem(what, str(path), hint="only plain LoRA and rsLoRA can"))
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", list)):
        value = config.get(key)
        if not isinstance(value, kind) or not value:
            problems.append(Problem(f"{key} is {json.dumps(value)}", str(path), hint="save the adapter again"))
    if problems:
        raise UserError(problems)
    return config


def _zero_problems(ups: dict[str, Tensor], file: Path) -> list[Problem]:
    """An all-zero B adds nothing: the mark of a run that did not train, or of a shard lost while saving."""
    zero = [name for name, up in ups.items() if not bool(up.any())]
    if len(zero) == len(ups):
        hint = "look at the losses of the run"
        return [Problem("the adapter is zero: nothing was trained", str(file), hint=hint)]
    return [Problem(f"lora_B of {name} is zero: it was not trained or not saved", str(file)) for name in zero[:_SHOWN]]


def merge_adapter(
    base: Path,
    adapter: LoraFile | None,
    out: Path,
    *,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> Merged:
    """Writes base + adapter as safetensors into `out`, which is complete afterwards or as it was before.

    base: a model folder (HF layout). base_dtype: what its weights are rounded to first, as in training. dtype: what the
    merged ones are stored in. adapter None only rewrites the base in `dtype`. Raises UserError for an adapter that does
    not fit this base or a value that is not finite, MachineFault when the disk is full (nothing is left behind then).
    """
    stored = {name: entry for name, entry in stored_tensors(base).items() if not _skipped(name, base)}
    factors = adapter.factors if adapter is not None else {}
    if adapter is not None:
        _check_fit(adapter, stored)
    shapes = {name: entry.shape for name, entry in stored.items()}
    size = total_bytes(shapes, dtype)
    check_space(out.parent, size)
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        tensors = _merged_tensors(stored, factors, adapter.scale if adapter else 0.0, base_dtype, dtype)
        write_model(aside, shapes, dtype, tensors, shard_bytes)
        publish(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_fault(error, out) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Merged(out, len(stored), len(factors), size)


def _skipped(name: str, base: Path) -> bool:
    """Tensors that a merged model does not hold: old files' rotary tables, and a head that is the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and _tied(base))


def _tied(base: Path) -> bool:
    return bool(json.loads((base / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False))


def _check_fit(adapter: LoraFile, stored: dict[str, Stored]) -> None:
    """Every factor finds its weight, and every weight that the adapter targets finds its factors."""
    problems = []
    for name, (down, up) in adapter.factors.items():
        want = (up.shape[0], down.shape[1])
        if name not in stored:
            problems.append(Problem(f"the adapter changes {name}, which the base does not have"))
        elif stored[name].shape != want:
            problems.append(Problem(f"{name} is {list(stored[name].shape)} in the base, {list(want)} in the adapter"))
    suffixes = tuple(f".{target}.weight" for target in adapter.targets)
    missing = [name for name in stored if name.endswith(suffixes) and name not in adapter.factors]
    problems += [Problem(f"the adapter targets {name} but holds no factors for it") for name in missing]
    if problems:
        more = len(problems) - _SHOWN
        hint = "is this the base it was trained on?" + (f" ({more} more like this)" if more > 0 else "")
        raise UserError([Problem(p.what, str(adapter.path), hint=hint) for p in problems[:_SHOWN]])


def _merged_tensors(
    stored: dict[str, Stored],
    factors: dict[str, tuple[Tensor, Tensor]],
    scale: float,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    for name, entry in stored.items():
        with safe_open(entry.file, framework="pt") as source:
            weight = source.get_tensor(name)
        if not weight.is_floating_point():
            raise UserError(f"{name} is {weight.dtype} in the base", hint="merge into the weights before quantisation")
        weight = weight.to(base_dtype).float()
        if name in factors:
            down, up = factors[name]
            weight = weight.addmm(up, down, alpha=scale)
        weight = weight.to(dtype)
        if not bool(torch.isfinite(weight).all()):
            found = str(dtype).removeprefix("torch.")
            hint = "look at the losses of the run; if they are fine, set export.dtype=float32"
            raise UserError(f"{name} has values that are not finite in {found}", hint=hint)
        yield name, weight


def check_space(folder: Path, size: int) -> None:
    """Raises MachineFault when `size` bytes and a margin for the small files do not fit on the disk of `folder`."""
    need = size + 32 * 2**20
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need:
        raise MachineFault(
            f"the merged model needs {need / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free",
            where=str(folder),
            hint="free some space, then: llama-ft export RUN",
        )


def disk_fault(error: OSError, out: Path) -> MachineFault:
    """What a failed write of `out` is called."""
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error)
    hint = "nothing is half-written; mend it, then: llama-ft export RUN"
    return MachineFault(f"could not write {out.name}: {why}", where=str(out.parent), hint=hint)
