"""Where shipped files and caches live.

Recipes, cards and launch configs stand at the top of a checkout and under `llama_ft/_shipped` in an installed wheel;
nothing else in the project needs to know which of the two it runs from.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_root() -> Path:
    """The folder that holds `recipes/`, `datasets/` and `accelerate_configs/`."""
    installed = PACKAGE / "_shipped"
    return installed if installed.is_dir() else PACKAGE.parent


def cache_dir(*parts: str) -> Path:
    """A folder for what can be made again: `$LLAMA_FT_CACHE`, else `llama_ft` in `$XDG_CACHE_HOME` or `~/.cache`."""
    override = os.environ.get("LLAMA_FT_CACHE")
    base = Path(override) if override else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama_ft"
    return base.joinpath(*parts)


def find_file(name: str | os.PathLike[str], *, beside: Path | None = None) -> Path | None:
    """Looks `name` up beside `beside` (a folder), in the working directory, then among the shipped files.

    Returns the first existing absolute path, or None. An absolute or `~` path is only looked up as it stands.
    """
    path = Path(name).expanduser()
    if path.is_absolute():
        return path if path.exists() else None
    for folder in (beside, Path.cwd(), shipped_root()):
        if folder is not None and (folder / path).exists():
            return (folder / path).resolve()
    return None
