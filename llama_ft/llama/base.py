"""From what a recipe calls `model.base` to a local folder in Hugging Face's layout."""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
import sys
from pathlib import Path

from filelock import FileLock

from llama_ft.errors import UserError
from llama_ft.llama import smollm2
from llama_ft.paths import cache_dir
from llama_ft.recipe.lookup import CHECKPOINT_FILES
from llama_ft.tokenizer.hub import hub_problem, quick_hub

TOKENIZER_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONVERSION = "1"
"""Raised when an import writes something else, so that older caches are made again."""


def hub_id(base: str) -> str | None:
    """The hub id that `model.base` is; None where it names a folder, a file, a preset or the shipped model.

    The shipped model has no id although the hub has one of its name: its weights went through 4 bits.
    """
    return base if _HUB_ID.fullmatch(base) and not Path(base).exists() else None


def locate_base(base: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that holds a base model's config, tokenizer and (with `weights`) safetensors.

    `base`: `smollm2-135m`, a local folder, a hub id, which is downloaded into the hub's own cache, or a checkpoint of
    another format (a `.gguf` or llama2.c's `.bin` file, a folder in Meta's layout), which is converted once into ours.
    A preset has no folder. Raises UserError when there is no such model, it cannot be reached, or it is damaged.
    """
    if base == smollm2.NAME:
        return smollm2.smollm2_folder()
    if base.startswith("preset:"):
        hint = f"name a hub id, a folder, a checkpoint file or {smollm2.NAME}"
        raise UserError(f"{base} is shapes alone: it has no folder of weights", key="model.base", hint=hint)
    path = Path(base).expanduser()
    if _is_foreign(path):
        return _converted(path.resolve(), weights=weights)
    if path.is_dir():
        _check_folder(path, weights=weights)
        return path.resolve()
    if path.is_file() or base.endswith(CHECKPOINT_FILES):
        what = f"{base} is no checkpoint that can be read" if path.is_file() else f"there is no file {base}"
        hint = f"name a folder, or a file that ends in {', '.join(CHECKPOINT_FILES)}"
        raise UserError(what, key="model.base", hint=hint)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = TOKENIZER_FILES + (WEIGHT_FILES if weights else [])
    try:
        with quick_hub():
            found = Path(snapshot_download(base, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise hub_problem(error, base) from error
    _check_folder(found, weights=weights)
    return found


BESIDE = (
    "params.json", "tok*.model", "tok*.bin", "tok*.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""What a conversion may read beside the weights."""


def _is_foreign(path: Path) -> bool:
    """Whether a base must be converted: a checkpoint file, or a folder in Meta's layout and not in HF's as well."""
    if path.is_dir():
        return not (path / "config.json").is_file() and any(path.glob("consolidated*.pth"))
    return path.is_file() and path.suffix in CHECKPOINT_FILES


def _converted(source: Path, *, weights: bool) -> Path:
    """The cached conversion of a checkpoint, made on first use; safe when several processes ask at once.

    Its key is the absolute path, size and time of change of every file that goes into it: the contents would say more,
    but reading 130 GB at every start only to find that nothing changed costs minutes. Without `weights` (for a preview)
    config and tokenizer alone are made, unless the whole is there already.
    """
    from llama_ft.llama.checkpoints.door import import_checkpoint

    stated = "\n".join(f"{file}\t{file.stat().st_size}\t{file.stat().st_mtime_ns}" for file in _ingredients(source))
    key = hashlib.sha256(f"{CONVERSION}\n{source}\n{stated}".encode()).hexdigest()[:16]
    whole = cache_dir("models", f"{source.stem}-{key}")
    folder = whole if weights or whole.is_dir() else whole.with_name(f"{whole.name}-tokenizer")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            for left in folder.parent.glob(f".{glob.escape(folder.name)}-*"):  # by a conversion that was killed
                shutil.rmtree(left, ignore_errors=True)
            if weights:
                print(f"converting {source} once into {folder}", file=sys.stderr, flush=True)
            import_checkpoint(source, folder, weights=weights)
    return folder


def _ingredients(source: Path) -> list[Path]:
    """The files a conversion is made from: the weights, what describes them, and every tokenizer it may find beside."""
    folder = source if source.is_dir() else source.parent
    beside = [path for pattern in BESIDE for path in folder.glob(pattern)]
    parts = list(folder.glob("consolidated*.pth")) if source.is_dir() or source.suffix == ".pth" else []
    above = folder.parent / "tokenizer.model"
    files = {*beside, *parts, *([above] if above.is_file() else []), *([source] if source.is_file() else [])}
    return sorted(files)


def _check_folder(folder: Path, *, weights: bool) -> None:
    config = folder / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{folder} is not a model folder: it has no config.json (found: {found})",
            key="model.base",
            hint="name a folder in Hugging Face's layout, or the checkpoint's file",
        )
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no safetensors",
            key="model.base",
            hint="pickled weights are not read; convert them with save_pretrained(..., safe_serialization=True)",
        )
    if weights:
        from llama_ft.llama.reward import is_reward_model

        if is_reward_model(folder):
            what = f"{folder} is a reward model: it scores answers, and writes none"
            raise UserError(what, key="model.base", hint="name the model that it was made from")
    if weights:  # headers alone: a shard that is cut off or missing is found before anything is tokenised
        from llama_ft.llama.checkpoints.hf import open_hf

        open_hf(folder)
