"""The merge: W ← W + s·B·A (LoRA, arXiv 2106.09685), some rows at a time from the base's files to the merged ones.

W is the weight the adapter was trained on: the base's, rounded to the recipe's dtype, and for QLoRA what its 4 or 8
bits make of it. DoRA gives each row of the sum its trained length (arXiv 2402.09353, equation 5). All is computed in
float32 and rounded once, to the export's dtype. Weights that were trained whole replace the base's; a reward model's
score, which its base does not have, stands in the place of the head. Whatever these formulas do not cover (trained
biases, other bases) is refused by name.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llama_ft.adapters.lora_file import LoraFile
from llama_ft.adapters.rows import BLOCK_BYTES, Requantise, row_parts, trained_rows
from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.files import publish
from llama_ft.llama.checkpoints.shards import SHARD_BYTES, Stored, stored_tensors, total_bytes, write_model
from llama_ft.llama.reward import SCORE

_SHOWN = 4


@dataclass(frozen=True)
class Merged:
    """What a merge wrote."""

    path: Path
    tensors: int
    adapted: int
    bytes: int


def merge_adapter(
    base: Path,
    adapter: LoraFile | None,
    out: Path,
    *,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    requantise: Requantise | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Merged:
    """Writes base + adapter as safetensors into `out`, which is complete afterwards or as it was before.

    base: a model folder (HF layout). base_dtype: what its weights are rounded to first, as in training. dtype: what the
    merged ones are stored in. requantise: what quantisation makes of a projection's weight, see
    :func:`llama_ft.adapters.quantised.requantised`. adapter None only rewrites the base in `dtype`. Raises UserError
    for an adapter that does not fit this base or a value that is not finite, MachineFault when the disk is full
    (nothing is left behind then).
    """
    scores = adapter is not None and adapter.scores
    tied = _tied(base) and not scores
    headless = tied or scores
    stored = {name: entry for name, entry in stored_tensors(base).items() if not _skipped(name, headless=headless)}
    whole = adapter.whole if adapter is not None else {}
    if adapter is not None:
        _check_fit(adapter, stored, tied=tied)
    # A vocabulary that has grown is in the weights that were trained whole.
    shapes = {name: tuple(whole[name].shape) if name in whole else entry.shape for name, entry in stored.items()}
    if SCORE in whole:
        shapes[SCORE] = tuple(whole[SCORE].shape)
    size = total_bytes(shapes, dtype)
    check_space(out.parent, size)
    aside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        tensors = _merged_parts(shapes, stored, adapter, base_dtype, dtype, requantise)
        write_model(aside, shapes, dtype, tensors, shard_bytes)
        publish(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_fault(error, out) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Merged(out, len(shapes), len(adapter.factors) if adapter else 0, size)


def _skipped(name: str, *, headless: bool) -> bool:
    """Tensors that a merged model does not hold: old files' rotary tables, and a head that is the embedding or gone."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and headless)


def _tied(base: Path) -> bool:
    return bool(json.loads((base / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False))


def _check_fit(adapter: LoraFile, stored: dict[str, Stored], *, tied: bool) -> None:
    """Every part of the adapter finds its weight, and every weight that the adapter targets finds its factors."""
    problems = []
    for name, (down, up) in adapter.factors.items():
        want = (up.shape[0], down.shape[1])
        if name not in stored:
            problems.append(Problem(f"the adapter changes {name}, which the base does not have"))
        elif stored[name].shape != want:
            problems.append(Problem(f"{name} is {list(stored[name].shape)} in the base, {list(want)} in the adapter"))
    for name, weight in adapter.whole.items():
        if name == SCORE:  # the base writes text and has none
            norm = stored.get("model.norm.weight")
            if norm is not None and weight.shape != (1, *norm.shape):
                found = f"{list(weight.shape)} in the adapter, the base's hidden states are {norm.shape[0]} wide"
                problems.append(Problem(f"{name} is {found}"))
        elif name == "lm_head.weight" and tied:
            if not torch.equal(weight, adapter.whole.get("model.embed_tokens.weight", weight)):
                problems.append(Problem("the base's head is its embedding, and the adapter holds two different ones"))
        elif name not in stored:
            problems.append(Problem(f"the adapter replaces {name}, which the base does not have"))
        elif stored[name].shape[1:] != weight.shape[1:] or stored[name].shape[0] > weight.shape[0]:
            found = f"{list(stored[name].shape)} in the base, {list(weight.shape)} in the adapter"
            problems.append(Problem(f"{name} is {found}"))
    missing = [name for name in stored if adapter.is_target(name) and name not in adapter.factors]
    problems += [Problem(f"the adapter targets {name} but holds no factors for it") for name in missing]
    if problems:
        more = len(problems) - _SHOWN
        hint = "is this the base it was trained on?" + (f" ({more} more like this)" if more > 0 else "")
        raise UserError([Problem(p.what, str(adapter.path), hint=hint) for p in problems[:_SHOWN]])


def _merged_parts(
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Stored],
    adapter: LoraFile | None,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    requantise: Requantise | None,
) -> Iterator[tuple[str, Tensor]]:
    """Rows after rows of each tensor, in the order of `shapes`."""
    for name, shape in shapes.items():
        if adapter is not None and name in adapter.whole:
            parts: Iterable[tuple[slice, Tensor]] = ((rows, adapter.whole[name][rows]) for rows in row_parts(shape))
        else:
            parts = trained_rows(name, stored[name], base_dtype, requantise, BLOCK_BYTES)
        for rows, part in parts:
            weight = part if adapter is None or name not in adapter.factors else adapted(part, rows, adapter, name)
            weight = weight.to(dtype)
            # Infinities and NaNs never add up to a number, and a sum takes a tenth of the time.
            if not math.isfinite(weight.sum().item()) and not bool(torch.isfinite(weight).all()):
                found = str(dtype).removeprefix("torch.")
                hint = "look at the losses of the run; if they are fine, set export.dtype=float32"
                raise UserError(f"{name} has values that are not finite in {found}", hint=hint)
            yield name, weight


def adapted(part: Tensor, rows: slice, adapter: LoraFile, name: str) -> Tensor:
    """Rows of W as rows of W + s·B·A, of DoRA each at its trained length; float32 [rows, in]."""
    down, up = adapter.factors[name]
    weight = part.addmm(up[rows], down, alpha=adapter.scale)
    if name in adapter.magnitudes:
        weight *= (adapter.magnitudes[name][rows] / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1)
    return weight


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
