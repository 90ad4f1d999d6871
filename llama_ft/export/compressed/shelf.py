"""Where compressed checkpoints lie, what they were made of, and which of them count: whole, proven, of this merged/."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llama_ft.data.prepare import Prepared
from llama_ft.export.compressed.tools import version
from llama_ft.export.compressed.types import IGNORED, TYPES, Compression
from llama_ft.export.gguf.write import hash_of
from llama_ft.files import publish, write_json
from llama_ft.recipe.run import Run

FOLDER = "compressed"
STAGED = ".compressed.new"
_RECIPE = "1"
"""Raised when the same weights would give another checkpoint, so that older ones are made again."""


@dataclass(frozen=True)
class Work:
    """One call of `write_compressed`: the run, how it is rounded, and where checkpoints are made before they count.

    `dtype`: of what is not rounded. `rows`: the documents to calibrate on. `made_from`: the sha256 of merged/.
    """

    run: Run
    shapes: dict[str, tuple[int, ...]]
    group: int
    dtype: str
    rows: list[list[int]]
    made_from: str
    tokenizer: PreTrainedTokenizerFast
    prepared: Prepared

    @property
    def staged(self) -> Path:
        """Where checkpoints are made."""
        return self.run.path / STAGED

    def folder(self, kind: Compression) -> Path:
        """Where a checkpoint comes to lie."""
        return self.run.path / FOLDER / kind.name


def settings(work: Work, kind: Compression) -> dict[str, Any]:
    """How a checkpoint is made, for export.json: all that decides it but the weights themselves."""
    made: dict[str, Any] = {
        "llmcompressor": version(),
        "method": kind.method,
        "dtype": work.dtype,
        "ignore": list(IGNORED),
    }
    made |= {"scheme": kind.scheme(work.group)}
    if kind.calibrated:
        listed = hashlib.sha256(json.dumps(work.rows).encode()).hexdigest()
        tokens = sum(map(len, work.rows))
        made["calibrated_on"] = {"documents": len(work.rows), "tokens": tokens, "sha256": listed}
    return made


def _key(work: Work, kind: Compression) -> str:
    """What a checkpoint is made of: the same key gives the same one."""
    said = json.dumps([_RECIPE, work.made_from, settings(work, kind)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def standing(work: Work, kind: Compression) -> dict[str, Any] | None:
    """The proof of a checkpoint that is there, whole, proven, and would come out the same; None where it is not."""
    folder = work.folder(kind)
    try:
        noted = json.loads(_beside(folder).read_text(encoding="utf-8"))
        whole = noted["key"] == _key(work, kind) and noted["proof"]["sha256"] == hash_of(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted["proof"] if whole else None


def retire(work: Work) -> None:
    """Nobody may serve weights that the run no longer has: a checkpoint of others loses its name, and its entry."""
    for kind in TYPES.values():
        folder = work.folder(kind)
        try:
            same = json.loads(_beside(folder).read_text(encoding="utf-8"))["made_from"] == work.made_from
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same and folder.is_dir():
            outdated = folder.with_name(f"{folder.name}.outdated")
            shutil.rmtree(outdated, ignore_errors=True)
            _beside(folder).unlink(missing_ok=True)
            folder.rename(outdated)


def publish_checkpoint(work: Work, kind: Compression, made: Path, proof: dict[str, Any]) -> dict[str, Any]:
    """Gives a proven checkpoint its name, a refused one that of a rejected one."""
    final = work.folder(kind)
    rejected, outdated = (final.with_name(f"{final.name}.{end}") for end in ("rejected", "outdated"))
    final.parent.mkdir(exist_ok=True)
    place = final if proof["ok"] else rejected
    for old in (rejected, *((outdated,) if proof["ok"] else (final,))):
        shutil.rmtree(old, ignore_errors=True)
    _beside(final).unlink(missing_ok=True)
    entry = {"file": place.relative_to(work.run.path).as_posix(), "type": kind.name, "sha256": hash_of(made), **proof}
    publish(made, place)
    if proof["ok"]:
        write_json(_beside(final), {"key": _key(work, kind), "made_from": work.made_from, "proof": entry})
    return entry


def read_proof(run: Run) -> dict[str, Any]:
    """export.json; empty where there is none."""
    try:
        return json.loads(run.proof_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def note(run: Run, new: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Puts entries into export.json's `formats`, in TYPES' order; those whose folder somebody removed go."""
    proof = read_proof(run)
    found = {**proof.get("formats", {}), **new}
    order = [f"{FOLDER}/{name}" for name in TYPES]
    names = [*(name for name in found if name not in order), *(name for name in order if name in found)]
    kept = {name: found[name] for name in names if name not in order or (run.path / found[name]["file"]).is_dir()}
    write_json(run.proof_file, proof | {"formats": kept})
    return kept
