"""From what a recipe calls `model.base` to a local folder in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.llama import smollm2
from llama_ft.tokenizer.hub import hub_problem, quick_hub

TOKENIZER_FILES = ["*.json", "*.model", "*.jinja", "*.txt"]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]


def locate_base(base: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that holds a base model's config, tokenizer and (with `weights`) safetensors.

    `base`: `smollm2-135m`, a local folder, or a hub id, which is downloaded into the hub's own cache. A preset has no
    folder. Raises UserError when there is no such model or it cannot be reached.
    """
    if base == smollm2.NAME:
        return smollm2.smollm2_folder()
    if base.startswith("preset:") or base.endswith(".gguf"):
        raise UserError(
            f"this version cannot start from {base} yet",
            key="model.base",
            hint=f"name a hub id, a folder in Hugging Face's layout, or {smollm2.NAME}",
        )
    folder = Path(base).expanduser()
    if folder.is_dir():
        _check_folder(folder, weights=weights)
        return folder.resolve()
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


def _check_folder(folder: Path, *, weights: bool) -> None:
    config = folder / "config.json"
    if not config.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(
            f"{folder} is not a model folder: it has no config.json (found: {found})",
            key="model.base",
            hint="name a folder in Hugging Face's layout",
        )
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} holds no safetensors",
            key="model.base",
            hint="pickled weights are not read; convert them with save_pretrained(..., safe_serialization=True)",
        )
