"""What is checked before a run costs anything: the folder, the disk, and that the launch is what its config says."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_ft.errors import MachineFault, Problem, UserError
from llama_ft.recipe.run import Run

TORCH_WRITER = ("PytorchStreamWriter", "inline_container.cc", "basic_ios::clear: iostream error")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""Folders that trackers (llama_ft/train/trackers.py) leave in a run."""
WATCHED = ("report.html", "status.json", "measured.json", "warnings.json", "mlflow.db", "mlflow.id")
"""Files that a run leaves besides its results."""
ADAM_BYTES = 8
"""Two float32 moments per trained parameter (arXiv 1412.6980)."""


def check_run_folder(run: Run, *, resume: bool, overwrite: bool) -> None:
    """UserError if a run is there and neither flag is set, or both; what --resume finds is looked at later."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite contradict each other", hint="give one of them")
    exists = run.recipe_file.exists() or run.checkpoints.exists()
    if exists and not resume and not overwrite:
        steps = run.steps()
        state = f"checkpoint step-{steps[-1]}" if steps else "no checkpoint"
        raise UserError(
            f"{run.path} already holds a run ({state})",
            key="output_dir",
            hint="go on with --resume, replace it with --overwrite, or set output_dir=…",
        )


def check_same_data(lock: dict[str, Any], hashes: dict[str, Any], run: Run) -> None:
    """Refuses to go on with other rows, another template or tokenizer than a run began with.

    `lock` is that of the run, empty for a fresh start; `hashes` those of the data as it is now. A file that only moved
    is the same data.
    """
    began = lock.get("hashes")
    if began is None:
        return
    changed = differing_parts(began, hashes)
    if changed:
        what = f"{' and '.join(changed)} changed since this run began: the order and the losses would be others"
        raise UserError(what, where=str(run.lock_file), hint="put them back, or start anew with --overwrite")


def check_same_everywhere(hashes: list[dict[str, Any]]) -> None:
    """Refuses processes that read other rows, another template or tokenizer than the first; `hashes`: of each rank.

    The same rows in another order of sources are others: a step would not hold the same documents.
    """
    problems = []
    for rank, other in enumerate(hashes):
        differing = differing_parts(hashes[0], other, ordered=True)
        if differing:
            what = f"{' and '.join(differing)} differ from those of rank 0: a step would not hold its documents"
            problems.append(Problem(what, f"rank {rank}", "data", "copy the files to every machine, or share them"))
    if problems:
        raise UserError(problems)


def differing_parts(one: dict[str, Any], other: dict[str, Any], *, ordered: bool = False) -> list[str]:
    """What of rows, template and tokenizer is another, in words. A file that only moved is the same data.

    ordered: sources in another order are other rows.
    """
    parts = {"data": "the rows", "template": "the template", "tokenizer": "the tokenizer"}
    pairs = {said: (_contents(one.get(name), ordered), _contents(other[name], ordered)) for name, said in parts.items()}
    return [said for said, (mine, theirs) in pairs.items() if mine != theirs]


def _contents(hashes: Any, ordered: bool) -> Any:
    if not isinstance(hashes, dict):
        return hashes
    return list(hashes.values()) if ordered else sorted(hashes.values())


def clear_run_folder(run: Run) -> None:
    """Removes what an earlier run left; anything else in the folder stays."""
    for entry in (
        "base",
        "checkpoints",
        "adapter",
        "merged",
        "merged.rejected",
        "gguf",
        "eval",
        "faults",
        "sampled",
        *TRACKERS,
    ):
        shutil.rmtree(run.path / entry, ignore_errors=True)
    for entry in ("metrics.jsonl", "export.json", "loss.png", "README.md", "run.lock.json", "recipe.yaml", *WATCHED):
        (run.path / entry).unlink(missing_ok=True)


def check_disk(
    folder: Path, *, trained: int, parameters: int, checkpoints: int, merged_bytes: int, base_bytes: int = 0
) -> None:
    """Refuses a run that cannot be stored.

    trained and parameters: counts of trainable and of all weights; checkpoints: how many will be kept at once;
    merged_bytes: bytes per weight of the merged export, 0 for none; base_bytes: bytes of a base that the run makes.
    Raises MachineFault with the estimate.
    """
    per_checkpoint = trained * (4 + ADAM_BYTES)
    need = base_bytes + checkpoints * per_checkpoint + trained * 4 + parameters * merged_bytes + 16 * 2**20
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < need:
        raise MachineFault(
            f"the run needs about {need / 2**30:.1f} GiB ({checkpoints} checkpoints of "
            f"{per_checkpoint / 2**30:.2f} GiB, adapter, merged model{', new base' if base_bytes else ''}) "
            f"and {free / 2**30:.1f} GiB are free",
            where=str(existing),
            hint="free some space, set output_dir to another disk, or raise training.save_every",
        )


def check_writable(run: Run) -> None:
    """Makes the run folder and proves that it can be written to."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        # A file of its own name: several processes of one run look at the same moment.
        with tempfile.NamedTemporaryFile(dir=run.path, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder: {error}", where=str(run.path), key="output_dir", hint="set output_dir=…"
        ) from error


@contextmanager
def disk_faults(run: Run) -> Iterator[None]:
    """Turns a disk that fails while a run is under way into a MachineFault that says what is whole and how to go on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_fault(error):
            raise
        mend = "mend the disk" if isinstance(error, OSError) else "free some space or mend the disk"
        if "space" in str(error):
            mend = "free some space"
        hint = f"{mend}; {how_to_go_on(run)}"
        raise MachineFault(f"the disk failed: {error}", where=str(run.path), hint=hint) from error


def how_to_go_on(run: Run) -> str:
    """Where a run that ended early stands, and the command that goes on."""
    steps = run.steps()
    if steps:
        return f"checkpoint step-{steps[-1]} is whole, go on with the same command and --resume"
    if run.recipe_file.exists():
        return "there is no checkpoint yet, start again with the same command and --resume"
    return "nothing is lost, start again with the same command"


def is_disk_fault(error: Exception) -> bool:
    """Whether a disk that is full, read-only or broken lies behind an error, whoever raised it.

    Python says so by a number, safetensors and tokenizers by the same number in their text, and torch only by the part
    of its zip writer that could not write.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in DISK_ERRORS
    text = str(error)
    return any(part in text for part in TORCH_WRITER) or any(f"(os error {number})" in text for number in DISK_ERRORS)
